"""Tensors between host and device, so that neither waits for the other."""

import torch
from torch import Tensor

from teachers.condition import Condition, Embeddings


def to_device(values: Condition, device: str | torch.device) -> Condition:
    """Of the host, on the device. To a GPU the copy is queued behind the work that it has; an ordinary one would first
    let all of that end.
    """
    if isinstance(values, Embeddings):
        return Embeddings({name: to_device(tensor, device) for name, tensor in values.tensors.items()})
    if torch.device(device).type != "cuda" or values.is_cuda:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


class Readback:
    """Numbers ``(N,)`` of the device that the host reads later."""

    def __init__(self, values: Tensor):
        self.values = values.detach().to("cpu", non_blocking=values.is_cuda)
        self.copied = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None

    def read(self) -> list[float]:
        """The numbers; waits until the device has come to them."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.values.tolist()
