"""The discrete noise schedules of DDPM's successors as smooth functions: which step has a given signal-to-noise ratio."""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class BetaSchedule(NamedTuple):
    """A variance-preserving schedule ``alpha_k^2 = prod (1 - beta_i)``, ``i`` from 0 to ``k``, of ``steps`` steps.

    ``kind``: ``linear`` (arXiv 2006.11239), ``scaled_linear`` (linear in ``sqrt(beta)``, Stable Diffusion) or
    ``squaredcos_cap_v2`` (arXiv 2102.09672; ``start`` and ``end`` do not matter).
    """

    kind: str = "linear"
    start: float = 1e-4
    end: float = 0.02
    steps: int = 1000


def betas(schedule: BetaSchedule) -> Tensor:
    """``(steps,)`` in fp64."""
    kind, start, end, steps = schedule
    if kind == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64).square()
    signal = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008).mul(math.pi / 2 / 1.008).cos().square()
    return (1 - signal[1:] / signal[:-1]).clamp(max=0.999)


@lru_cache
def knots(schedule: BetaSchedule) -> tuple[Tensor, Tensor]:
    """Log noise-to-signal ratio ``log(sigma_k^2 / alpha_k^2)`` of every step, increasing, and ``dk`` over it there.

    The slopes are harmonic means of their neighbours' (Fritsch and Butland 1984), so that the cubic between the steps is
    increasing and its derivative, which a student's tangent contains, is continuous.
    """
    signal = (1 - betas(schedule)).cumprod(0)
    noise = (1 - signal).log() - signal.log()
    secants = 1 / noise.diff()
    inner = 2 / (1 / secants[1:] + 1 / secants[:-1])
    return noise, torch.cat([secants[:1], inner, secants[-1:]])


@lru_cache
def knots_on(schedule: BetaSchedule, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """:func:`knots` where they are used: a copy for every call would make the host wait for a GPU."""
    noise, slopes = knots(schedule)
    return noise.to(device, dtype), slopes.to(device, dtype)


def step_at(log_noise: Tensor, schedule: BetaSchedule) -> Tensor:
    """The fractional step, from 0 to ``steps - 1``, at ``log_noise = log(sigma^2 / alpha^2)`` ``(B,)``.

    It is exact at the steps, a monotone cubic between them, and stays at the first and the last beyond them.
    """
    noise, slopes = knots_on(schedule, log_noise.device, log_noise.dtype)
    x = log_noise.clamp(noise[0], noise[-1])
    k = torch.searchsorted(noise, x.detach(), right=True).sub(1).clamp(0, schedule.steps - 2)
    width = noise[k + 1] - noise[k]
    u = (x - noise[k]) / width
    rise = u.square() * (3 - 2 * u)
    start, end = u * (1 - u).square(), u.square() * (u - 1)
    return k + rise + width * (start * slopes[k] + end * slopes[k + 1])
