"""Where networks compute, and in which precision."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch

PRECISIONS = ("no", "bf16")


def default_device() -> torch.device:
    """A GPU if there is one, else the CPU; of several processes the CPU, where each is then told its own device."""
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    return torch.device("cuda" if alone and torch.cuda.is_available() else "cpu")


def chosen_device(name: str | torch.device | None) -> torch.device:
    """The device of that name, by default :func:`default_device`.

    Raises:
        ValueError: no name of a device, or one that this machine or this PyTorch does not have, or whose memory is full.
    """
    if name is None:
        return default_device()
    allowed = "allowed are cpu, and with a GPU cuda or cuda:N"
    try:
        device = torch.device(name)
    except RuntimeError as error:  # PyTorch's own sentence lists every kind of device that there is anywhere
        raise ValueError(f"{str(name)!r} is no device; {allowed}") from error
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"device {str(name)!r} cannot be used; {allowed} ({why})") from error
    return device


def autocast(mixed_precision: str, device: torch.device) -> AbstractContextManager:
    """A context in which networks compute in a precision, one of :data:`PRECISIONS`, but their times in fp32; ``no`` leaves
    them what they are.
    """
    return torch.autocast(device.type, torch.bfloat16) if mixed_precision == "bf16" else nullcontext()
