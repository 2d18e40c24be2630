"""The derivative of a network along the PF-ODE, by forward-mode AD, made safe for what real networks contain."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

RNGState = tuple[Tensor, Tensor | None]


@torch.no_grad()
def jvp(function: Callable, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """``function(*primals)`` and its directional derivative along ``tangents``, both detached.

    ``function`` must call the bare network, not its DDP wrapper. Attention runs on the one SDPA kernel that forward
    mode differentiates; gradient checkpointing is inert, since nothing is recorded for a backward pass.
    """
    tangents = tuple(v.to(x.dtype) for x, v in zip(primals, tangents, strict=True))
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(function, primals, tangents)


def record_rng(device: torch.device) -> RNGState:
    """The state of the generators that dropout draws from on ``device``."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), cuda


@contextmanager
def replay_rng(state: RNGState) -> Iterator[None]:
    """Draw again what was drawn after ``record_rng``: the same dropout masks in the derivative and in the loss."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
    yield
