"""Exponential moving averages of a network's weights, several at once."""

import copy

import numpy as np
import torch
from torch import Tensor, nn

from distill.parallel import local


def power_exponent(sigma_rel: float) -> float:
    """Exponent ``gamma`` of the power-function profile of relative width ``sigma_rel``: the largest real root of
    ``g^3 + 7 g^2 + (16 - s^-2) g + (12 - s^-2)`` (EDM2, arXiv 2312.02696, appendix C).

    Raises:
        ValueError: outside ``(0, 0.28]``, where no such profile exists.
    """
    if not 0 < sigma_rel <= 0.28:
        raise ValueError(f"sigma_rel must be in (0, 0.28], got {sigma_rel}")
    roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
    return float(roots[np.isreal(roots)].real.max())


class EMA:
    """A shadow copy of ``network`` that follows it; parameters that are frozen it shares.

    Args:
        half_life_images: images after which an old weight's share has halved. It is shortened to a tenth of the
            images seen so far, so that the first average does not remember the initial weights.
        sigma_rel: relative width of a power-function average instead; its decay is ``(1 - batch / images)^(gamma + 1)``.
    """

    def __init__(self, network: nn.Module, half_life_images: float | None = None, sigma_rel: float | None = None):
        shared = {id(p): p for p in network.parameters() if not p.requires_grad}
        self.network = copy.deepcopy(network, shared).eval().requires_grad_(False)
        self.half_life_images = half_life_images
        self.exponent = None if sigma_rel is None else power_exponent(sigma_rel)

    def decay(self, images: int, batch: int) -> float:
        """The factor on the old average after a step of ``batch`` images, ``images`` in total with this step."""
        if self.exponent is not None:
            return (1 - batch / images) ** (self.exponent + 1)
        return 0.5 ** (batch / min(self.half_life_images, max(images / 10, 1e-8)))


@torch.no_grad()
def update_averages(averages: list[EMA], network: nn.Module, images: int, batch: int) -> None:
    """Fold the weights of ``network`` into all averages after a step of ``batch`` images, ``images`` in total; buffers are
    copied.

    One tensor of the network after the other, into every average: on a CPU it then comes from the memory once.
    """
    shares = [1 - ema.decay(images, batch) for ema in averages]
    averaged, current, weights = [], [], []
    for new, *old in zip(tensors(network), *(tensors(ema.network) for ema in averages), strict=True):
        if isinstance(new, nn.Parameter) and new.requires_grad:
            averaged += [local(each.data) for each in old]
            current += [local(new.data)] * len(old)
            weights += shares
            continue
        for each in old:
            if each is not new:
                local(each).copy_(local(new))
    torch._foreach_lerp_(averaged, current, weights)


def tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]
