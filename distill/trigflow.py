"""TrigFlow (Lu & Song, arXiv 2410.11081, section 3) as pure functions.

Throughout, ``x_t = cos(t) x0 + sin(t) z`` with ``z ~ N(0, sigma_data^2 I)`` and ``t`` in ``[0, pi/2]``; ``F`` is the
network output for which the PF-ODE is ``dx_t/dt = sigma_data F``. ``t`` is a tensor ``(B,)`` (or a scalar tensor) that
broadcasts over samples ``x`` of shape ``(B, ...)``; results keep the dtype of ``x`` unless ``t`` is wider.
"""

import math

import torch
from torch import Tensor

from distill.noise import draw


def expand(t: Tensor, x: Tensor) -> Tensor:
    """View ``t`` ``(B,)`` as ``(B, 1, ..., 1)`` so that it broadcasts over ``x`` ``(B, ...)``."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim)) if t.ndim else t


def perturb(x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """Diffusion process ``x_t = cos(t) x0 + sin(t) z`` (section 3)."""
    t = expand(t, x0)
    return t.cos() * x0 + t.sin() * z


def velocity(x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """Conditional velocity ``v_t = cos(t) z - sin(t) x0``, the regression target of ``sigma_data F`` (equation 4)."""
    t = expand(t, x0)
    return t.cos() * z - t.sin() * x0


def ddim_step(x_s: Tensor, F: Tensor, s: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    """First-order step of the PF-ODE from ``s`` to ``t``: ``cos(s - t) x_s - sin(s - t) sigma_data F`` (equation 26)."""
    step = expand(s - t, x_s)
    return step.cos() * x_s - step.sin() * sigma_data * F


def consistency_function(x_t: Tensor, F: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    """``f(x_t, t) = cos(t) x_t - sin(t) sigma_data F`` (equation 5): the DDIM step to time 0.

    It is the denoiser ``D`` for a diffusion network (equation 23) and the sample for a consistency network.
    """
    return ddim_step(x_t, F, t, torch.zeros_like(t), sigma_data)


def network_output(x_t: Tensor, x0: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    """The ``F`` of a denoised ``x0``, ``(cos(t) x_t - x0) / (sin(t) sigma_data)``: the inverse of equation 5."""
    t = expand(t, x_t)
    return (t.cos() * x_t - x0) / (t.sin() * sigma_data)


def time_from_sigma(sigma: Tensor, sigma_data: float) -> Tensor:
    """TrigFlow time of EDM's noise level, ``t = arctan(sigma / sigma_data)`` (equation 30)."""
    return torch.atan(torch.as_tensor(sigma) / sigma_data)


def sigma_from_time(t: Tensor, sigma_data: float) -> Tensor:
    """EDM's noise level of a TrigFlow time, ``sigma = sigma_data tan(t)``."""
    return sigma_data * torch.tan(torch.as_tensor(t))


def time_from_flow(s: Tensor, sigma_data: float) -> Tensor:
    """TrigFlow time of a rectified flow's ``s`` (``x_s = (1 - s) x0 + s eps``): ``t = atan2(s, (1 - s) sigma_data)``."""
    s = torch.as_tensor(s)
    return torch.atan2(s, (1 - s) * sigma_data)


def sample_times(
    n: int, p_mean: float, p_std: float, sigma_data: float, generator: torch.Generator | None = None, device=None
) -> Tensor:
    """``n`` proposal times: ``log(sigma_data tan t) ~ N(p_mean, p_std^2)``, ``t = arctan(exp(tau) / sigma_data)``
    (section 4.2). fp64, because ``t`` crowds against ``pi/2`` where fp32 cannot resolve ``cos(t)``.
    """
    tau = draw(torch.randn, (n,), generator, device=device, dtype=torch.float64) * p_std + p_mean
    return torch.atan(tau.exp() / sigma_data)


def max_time(sigma_data: float, sigma_max: float = 80.0) -> float:
    """The time from which sampling starts, ``arctan(sigma_max / sigma_data)`` (appendix G)."""
    return math.atan(sigma_max / sigma_data)
