"""What a pretrained Gaussian teacher's network means, written as data, and its exact map to TrigFlow.

A teacher noises data as ``y = alpha x0 + sigma eps``, ``eps ~ N(0, I)``, feeds ``y`` (perhaps scaled) and some time
signal to its network, and trains the output towards ``u = a x0 + b eps``. At the TrigFlow time ``t`` of equal
signal-to-noise ratio, ``tan t = sigma / (alpha sigma_data)``, write ``(alpha, sigma) = k (cos t, sigma_data sin t)``.
Then

    y = k x_t        and        F = (u - (a cos t + b sin t / sigma_data) x_t) / (b cos t - a sigma_data sin t).

Nothing is divided by ``sin t`` or ``cos t`` except where the prediction itself loses the information (an
eps-prediction at ``pi/2``, an x0-prediction at 0). ``sigma_data`` is the student's; a teacher's own may differ (EDM).
Source: arXiv 2410.11081 appendix B and equations 29 to 34; the single formula is derived in ``docs/method.md``.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Times are kept this far (radians) from 0 and pi/2 wherever a logarithm of tan(t) is taken.
TIME_MARGIN = 1e-7


class Coefficients(NamedTuple):
    """Everything the map needs at times ``t``; each is ``(B,)`` and differentiable in ``t``."""

    input_scale: Tensor  # network input = input_scale * x_t
    time: Tensor  # the network's own time signal
    a: Tensor  # network output u = a x0 + b eps
    b: Tensor


@dataclass(frozen=True)
class Parameterization:
    """A teacher's convention.

    Args:
        family: ``"edm"`` (``y = x0 + sigma eps``), ``"vp"`` (``alpha^2 + sigma^2 = 1``), ``"flow"``
            (``y = (1 - s) x0 + s eps``) or ``"trigflow"``.
        prediction: the network's output. ``edm``: ``"raw"`` (the U-Net inside EDM's preconditioning) or ``"x0"`` (the
            whole denoiser ``D(y, sigma)``); ``vp``: ``"eps"``, ``"v"`` (``alpha eps - sigma x0``) or ``"x0"``;
            ``flow``: ``"velocity"`` (``eps - x0``) or ``"-velocity"`` (``x0 - eps``); ``trigflow``: ``"F"``.
        time: the time signal. ``edm``: ``"log_sigma/4"`` or ``"sigma"``; ``vp``: ``"log_snr"``
            (``log(alpha^2 / sigma^2)``), ``"t"`` (the angle ``arctan(sigma / alpha)``) or ``"ddpm_linear"`` (DDPM's step,
            0 to 999, of the linear schedule of betas from 1e-4 to 0.02); ``flow``: ``"s"`` (1 is noise) or ``"1-s"`` (1
            is data); ``trigflow``: ``"t"``.
        time_scale: factor on the time signal (1000 for SD3, Flux, Wan).
        teacher_sigma_data: ``sigma_data`` inside EDM's preconditioning; ``None`` means the student's. Only for
            ``edm`` with ``"raw"``.

    Raises:
        ValueError: for a combination that is not in the tables above.
    """

    family: str
    prediction: str
    time: str
    time_scale: float = 1.0
    teacher_sigma_data: float | None = None

    def __post_init__(self):
        if self.family not in PREDICTIONS:
            raise ValueError(f"parameterization family is {self.family!r}; allowed: {', '.join(PREDICTIONS)}")
        if self.prediction not in PREDICTIONS[self.family]:
            allowed = ", ".join(PREDICTIONS[self.family])
            raise ValueError(f"prediction is {self.prediction!r}; family {self.family!r} allows: {allowed}")
        if self.time not in TIMES[self.family]:
            allowed = ", ".join(TIMES[self.family])
            raise ValueError(f"time signal is {self.time!r}; family {self.family!r} allows: {allowed}")
        if self.teacher_sigma_data is not None and self.prediction != "raw":
            raise ValueError("teacher_sigma_data belongs to an edm teacher with prediction 'raw' only")
        if self.teacher_sigma_data is not None and not self.teacher_sigma_data > 0:
            raise ValueError(f"teacher_sigma_data must be positive, got {self.teacher_sigma_data}")
        if not self.time_scale > 0:
            raise ValueError(f"time_scale must be positive, got {self.time_scale}")

    def coefficients(self, t: Tensor, sigma_data: float) -> Coefficients:
        """The map at times ``t`` ``(B,)``, in the dtype of ``t`` (use fp64: it costs nothing on ``B`` numbers)."""
        cos, sin = t.cos(), t.sin()
        scale, a, b = PREDICTIONS[self.family][self.prediction](cos, sin, sigma_data, self)
        time = TIMES[self.family][self.time](t, sigma_data) * self.time_scale
        return Coefficients(scale, time, a, b)

    def to_trigflow(self, u: Tensor, x_t: Tensor, t: Tensor, c: Coefficients, sigma_data: float) -> Tensor:
        """``F`` ``(B, ...)`` of a network output ``u`` ``(B, ...)``, in the dtype of ``x_t``."""
        cos, sin = t.cos(), t.sin()
        weight = 1 / (c.b * cos - c.a * sigma_data * sin)
        offset = (c.a * cos + c.b * sin / sigma_data) * weight
        shape = (-1,) + (1,) * (x_t.ndim - 1)
        return u * weight.to(x_t.dtype).view(shape) - offset.to(x_t.dtype).view(shape) * x_t

    def to_dict(self) -> dict:
        """Plain values for a JSON card; ``Parameterization(**d)`` is the inverse."""
        return asdict(self)


def _edm_raw(cos, sin, sd, p):
    own = p.teacher_sigma_data or sd
    norm = torch.rsqrt((sd * sin).square() + (own * cos).square())  # 1 / (cos t sqrt(sigma^2 + own^2))
    return norm, sd * sin * norm / own, -own * cos * norm


def _edm_x0(cos, sin, sd, p):
    return 1 / cos, torch.ones_like(cos), torch.zeros_like(cos)


def _vp_norm(cos, sin, sd):
    return torch.rsqrt(cos.square() + (sd * sin).square())


def _vp_eps(cos, sin, sd, p):
    return _vp_norm(cos, sin, sd), torch.zeros_like(cos), torch.ones_like(cos)


def _vp_v(cos, sin, sd, p):
    norm = _vp_norm(cos, sin, sd)
    return norm, -sd * sin * norm, cos * norm


def _vp_x0(cos, sin, sd, p):
    return _vp_norm(cos, sin, sd), torch.ones_like(cos), torch.zeros_like(cos)


def _flow_velocity(cos, sin, sd, p):
    return 1 / (cos + sd * sin), -torch.ones_like(cos), torch.ones_like(cos)


def _flow_negative_velocity(cos, sin, sd, p):
    scale, a, b = _flow_velocity(cos, sin, sd, p)
    return scale, -a, -b


def _trigflow(cos, sin, sd, p):
    return torch.full_like(cos, 1 / sd), -sin / sd, cos


# family -> prediction -> (cos t, sin t, sigma_data, parameterization) -> (input_scale, a, b)
PREDICTIONS: dict[str, dict[str, Callable]] = {
    "edm": {"raw": _edm_raw, "x0": _edm_x0},
    "vp": {"eps": _vp_eps, "v": _vp_v, "x0": _vp_x0},
    "flow": {"velocity": _flow_velocity, "-velocity": _flow_negative_velocity},
    "trigflow": {"F": _trigflow},
}


def _log_sigma(t: Tensor, sd: float) -> Tensor:
    t = t.clamp(TIME_MARGIN, torch.pi / 2 - TIME_MARGIN)
    return t.sin().log() - t.cos().log() + math.log(sd)


def _log_snr(t: Tensor, sd: float) -> Tensor:
    return -2 * _log_sigma(t, sd)


def ddpm_log_snr(num_steps: int = 1000) -> Tensor:
    """The log-SNRs ``(num_steps,)`` of DDPM's steps under its linear schedule (arXiv 2006.11239), falling, fp64."""
    betas = torch.linspace(1e-4, 0.02, num_steps, dtype=torch.float64, device="cpu")
    kept = torch.cumprod(1 - betas, 0)  # alpha^2 after each step
    return kept.log() - (1 - kept).log()


DDPM_LOG_SNR = ddpm_log_snr()


def _ddpm_step(t: Tensor, sd: float) -> Tensor:
    """The step as a real number: linear in log-SNR between the steps, and never outside of what was trained."""
    knots, log_snr = DDPM_LOG_SNR.to(t), _log_snr(t, sd)
    last = len(knots) - 1
    right = torch.searchsorted(-knots, -log_snr.detach()).clamp(1, last)
    left = right - 1
    step = left + (knots[left] - log_snr) / (knots[left] - knots[right])
    return step.clamp(0, last)


def _flow_s(t: Tensor, sd: float) -> Tensor:
    return sd * t.sin() / (t.cos() + sd * t.sin())


# family -> time signal -> (t, sigma_data) -> the network's time before time_scale
TIMES: dict[str, dict[str, Callable]] = {
    "edm": {"log_sigma/4": lambda t, sd: _log_sigma(t, sd) / 4, "sigma": lambda t, sd: _log_sigma(t, sd).exp()},
    "vp": {
        "log_snr": _log_snr, "t": lambda t, sd: torch.atan2(sd * t.sin(), t.cos()), "ddpm_linear": _ddpm_step,
    },  # fmt: skip
    "flow": {"s": _flow_s, "1-s": lambda t, sd: 1 - _flow_s(t, sd)},
    "trigflow": {"t": lambda t, sd: t},
}

EDM = Parameterization("edm", "raw", "log_sigma/4")
EDM_DENOISER = Parameterization("edm", "x0", "sigma")
DIT = Parameterization("vp", "eps", "ddpm_linear")
RECTIFIED_FLOW = Parameterization("flow", "velocity", "s")
SIT = Parameterization("flow", "-velocity", "1-s")
TRIGFLOW = Parameterization("trigflow", "F", "t")
VP_EPS = Parameterization("vp", "eps", "log_snr")
VP_V = Parameterization("vp", "v", "log_snr")
VP_X0 = Parameterization("vp", "x0", "log_snr")

# What recipes may name.
PRESETS = {
    "DIT": DIT, "EDM": EDM, "EDM_DENOISER": EDM_DENOISER, "RECTIFIED_FLOW": RECTIFIED_FLOW, "SIT": SIT,
    "TRIGFLOW": TRIGFLOW, "VP_EPS": VP_EPS, "VP_V": VP_V, "VP_X0": VP_X0,
}  # fmt: skip
