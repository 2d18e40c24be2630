"""What a pretrained Gaussian teacher's network means, written as data, and its exact map to TrigFlow.

A teacher noises data as ``y = alpha x0 + sigma eps``, ``eps ~ N(0, I)``, feeds ``y`` (perhaps scaled) and some time
signal to its network, and trains the output towards ``u = a x0 + b eps``. At the TrigFlow time ``t`` of equal
signal-to-noise ratio, ``tan t = sigma / (alpha sigma_data)``, write ``(alpha, sigma) = k (cos t, sigma_data sin t)``.
Then

    y = k x_t        and        F = (u - (a cos t + b sin t / sigma_data) x_t) / (b cos t - a sigma_data sin t).

Nothing is divided by ``sin t`` or ``cos t`` except where the prediction itself loses the information (an
eps-prediction or a score at ``pi/2``, an x0-prediction at 0). ``sigma_data`` is the student's; a teacher's own may
differ (EDM).
Source: arXiv 2410.11081 appendix B and equations 29 to 34; the single formula is derived in ``docs/method.md``.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from teachers.noise_schedule import BetaSchedule, step_at

# Times are kept this far (radians) from 0 and pi/2 wherever a logarithm of tan(t) is taken, and from 0 where a score is
# infinite.
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
            whole denoiser ``D(y, sigma)``) or ``"-eps"`` (the network of ``D = y + sigma F(y)``, the VE-SDE's);
            ``vp``: ``"eps"``, ``"v"`` (``alpha eps - sigma x0``), ``"x0"`` or ``"score"`` (``-eps / sigma``, the
            gradient of ``log p(y)``); ``flow``: ``"velocity"`` (``eps - x0``) or ``"-velocity"`` (``x0 - eps``);
            ``trigflow``: ``"F"``.
        time: the time signal. ``edm``: ``"log_sigma/4"``, ``"log(sigma/2)"`` or ``"sigma"``; ``vp``: ``"log_snr"``
            (``log(alpha^2 / sigma^2)``), ``"t"`` (the angle ``arctan(sigma / alpha)``), ``"-2log(alpha)"`` (the time of
            the Ornstein-Uhlenbeck process ``dy = -y dt / 2 + dW``, ``y = e^{-t/2} x0 + sqrt(1 - e^{-t}) eps``; of any
            VP-SDE it is the integral of ``beta``, arXiv 2011.13456), ``"linear_beta"``, ``"cosine"`` (steps 0 to
            ``M - 1``) or ``"ddpm_linear"``, ``"ddpm_scaled_linear"``, ``"ddpm_cosine"``
            (:mod:`teachers.noise_schedule`); ``flow``: ``"s"`` (1 is noise) or ``"1-s"`` (1
            is data); ``trigflow``: ``"t"``. The first three also ``"trigflow"``, the angle of TrigFlow itself.
        time_scale: factor on the time signal (1000 for SD3, Flux, Wan).
        teacher_sigma_data: ``sigma_data`` inside EDM's preconditioning; ``None`` means the student's. Only for
            ``edm`` with ``"raw"``.
        schedule: constants of the time signal. ``"linear_beta"``, the VP-SDE (arXiv 2011.13456): ``beta_d``,
            ``beta_min``, ``M``. ``"cosine"``, improved DDPM (arXiv 2102.09672): ``C_2``, ``M``. The ``"ddpm_*"``:
            ``beta_start``, ``beta_end``, ``num_train_timesteps``. ``None`` for others.

    Raises:
        ValueError: for a combination that is not in the tables above.
    """

    family: str
    prediction: str
    time: str
    time_scale: float = 1.0
    teacher_sigma_data: float | None = None
    schedule: dict[str, float] | None = None

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
        self.check_schedule()

    def check_schedule(self) -> None:
        names = SCHEDULES.get(self.time, ())
        given = self.schedule or {}
        if not isinstance(given, dict) or set(given) != set(names):
            raise ValueError(f"time signal {self.time!r} needs the schedule {', '.join(names) or None}, got {self.schedule}")
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"schedule: {name} must be a positive number, got {value!r}")

    def coefficients(self, t: Tensor, sigma_data: float) -> Coefficients:
        """The map at times ``t`` ``(B,)``, in the dtype of ``t`` (use fp64: it costs nothing on ``B`` numbers)."""
        cos, sin = t.cos(), t.sin()
        scale, a, b = PREDICTIONS[self.family][self.prediction](cos, sin, sigma_data, self)
        time = TIMES[self.family][self.time](t, sigma_data, self) * self.time_scale
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


def _edm_negative_eps(cos, sin, sd, p):
    return 1 / cos, torch.zeros_like(cos), -torch.ones_like(cos)


def _vp_norm(cos, sin, sd):
    return torch.rsqrt(cos.square() + (sd * sin).square())


def _vp_eps(cos, sin, sd, p):
    return _vp_norm(cos, sin, sd), torch.zeros_like(cos), torch.ones_like(cos)


def _vp_v(cos, sin, sd, p):
    norm = _vp_norm(cos, sin, sd)
    return norm, -sd * sin * norm, cos * norm


def _vp_x0(cos, sin, sd, p):
    return _vp_norm(cos, sin, sd), torch.ones_like(cos), torch.zeros_like(cos)


def _vp_score(cos, sin, sd, p):
    # The smallest sin only keeps the target finite: b cancels in the offset, and the weight of a score there is about 0.
    norm = _vp_norm(cos, sin, sd)
    return norm, torch.zeros_like(cos), -1 / (sd * sin.clamp(min=TIME_MARGIN) * norm)


def _flow_velocity(cos, sin, sd, p):
    return 1 / (cos + sd * sin), -torch.ones_like(cos), torch.ones_like(cos)


def _flow_negative_velocity(cos, sin, sd, p):
    scale, a, b = _flow_velocity(cos, sin, sd, p)
    return scale, -a, -b


def _trigflow(cos, sin, sd, p):
    return torch.full_like(cos, 1 / sd), -sin / sd, cos


# family -> prediction -> (cos t, sin t, sigma_data, parameterization) -> (input_scale, a, b)
PREDICTIONS: dict[str, dict[str, Callable]] = {
    "edm": {"raw": _edm_raw, "x0": _edm_x0, "-eps": _edm_negative_eps},
    "vp": {"eps": _vp_eps, "v": _vp_v, "x0": _vp_x0, "score": _vp_score},
    "flow": {"velocity": _flow_velocity, "-velocity": _flow_negative_velocity},
    "trigflow": {"F": _trigflow},
}


def _log_sigma(t: Tensor, sd: float) -> Tensor:
    t = t.clamp(TIME_MARGIN, torch.pi / 2 - TIME_MARGIN)
    return t.sin().log() - t.cos().log() + math.log(sd)


def _trigflow_time(t: Tensor, sd: float, p: Parameterization) -> Tensor:
    """The angle itself: what a network expects whose time embedding was replaced (``teachers.retrofit``)."""
    return t


def _ornstein_uhlenbeck_time(t: Tensor, sd: float, p: Parameterization) -> Tensor:
    """``-2 log alpha``, by ``1 / alpha^2 = 1 + sigma^2 / alpha^2``, which keeps its digits at small noise."""
    return torch.log1p((2 * _log_sigma(t, sd)).exp())


def _linear_beta_step(t: Tensor, sd: float, p: Parameterization) -> Tensor:
    """``(M - 1) tau`` at the time ``tau`` of the VP-SDE, ``-2 log alpha = beta_d tau^2 / 2 + beta_min tau``.

    The root is written without a difference, which would lose its digits at small noise.
    """
    beta_d, beta_min, steps = (p.schedule[name] for name in SCHEDULES["linear_beta"])
    exponent = _ornstein_uhlenbeck_time(t, sd, p)
    return (steps - 1) * 2 * exponent / ((beta_min**2 + 2 * beta_d * exponent).sqrt() + beta_min)


def _cosine_step(t: Tensor, sd: float, p: Parameterization) -> Tensor:
    """``k`` in ``alpha = sin(w j) / sin(w M)``, ``w = pi / (2 M (1 + C_2))``, with ``j = M - 1 - k`` steps to the noisiest.

    The network was trained at whole steps, to which EDM's ``iDDPMPrecond`` rounds (its ``u_j`` is ``sigma / alpha`` at
    ``j``). This is the smooth function through all of them: differentiable, and equal at every step but ``j = 0``,
    which improved DDPM clips, at sigma above 640.
    """
    offset, steps = (p.schedule[name] for name in SCHEDULES["cosine"])
    step_angle = math.pi / (2 * steps * (1 + offset))
    alpha = t.cos() * _vp_norm(t.cos(), t.sin(), sd)
    return steps - 1 - torch.asin(alpha * math.sin(step_angle * steps)) / step_angle


def _ddpm_step(kind: str) -> Callable:
    """The fractional step of a schedule of betas."""
    return lambda t, sd, p: step_at(2 * _log_sigma(t, sd), BetaSchedule(kind, *(p.schedule[name] for name in DDPM)))


def _flow_s(t: Tensor, sd: float) -> Tensor:
    return sd * t.sin() / (t.cos() + sd * t.sin())


# time signal -> the constants that it needs
DDPM = ("beta_start", "beta_end", "num_train_timesteps")
SCHEDULES = {
    "linear_beta": ("beta_d", "beta_min", "M"), "cosine": ("C_2", "M"), "ddpm_linear": DDPM, "ddpm_scaled_linear": DDPM,
    "ddpm_cosine": DDPM,
}  # fmt: skip

# family -> time signal -> (t, sigma_data, parameterization) -> the network's time before time_scale
TIMES: dict[str, dict[str, Callable]] = {
    "edm": {
        "trigflow": _trigflow_time,
        "log_sigma/4": lambda t, sd, p: _log_sigma(t, sd) / 4,
        "log(sigma/2)": lambda t, sd, p: _log_sigma(t, sd) - math.log(2),
        "sigma": lambda t, sd, p: _log_sigma(t, sd).exp(),
    },
    "vp": {
        "trigflow": _trigflow_time,
        "log_snr": lambda t, sd, p: -2 * _log_sigma(t, sd),
        "t": lambda t, sd, p: torch.atan2(sd * t.sin(), t.cos()),
        "-2log(alpha)": _ornstein_uhlenbeck_time,
        "linear_beta": _linear_beta_step,
        "cosine": _cosine_step,
        "ddpm_linear": _ddpm_step("linear"),
        "ddpm_scaled_linear": _ddpm_step("scaled_linear"),
        "ddpm_cosine": _ddpm_step("squaredcos_cap_v2"),
    },
    "flow": {
        "trigflow": _trigflow_time, "s": lambda t, sd, p: _flow_s(t, sd), "1-s": lambda t, sd, p: 1 - _flow_s(t, sd),
    },  # fmt: skip
    "trigflow": {"t": lambda t, sd, p: t},
}

EDM = Parameterization("edm", "raw", "log_sigma/4")
EDM_DENOISER = Parameterization("edm", "x0", "sigma")
LINEAR_BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000}
DIT = Parameterization("vp", "eps", "ddpm_linear", schedule=LINEAR_BETAS)
RECTIFIED_FLOW = Parameterization("flow", "velocity", "s")
SIT = Parameterization("flow", "-velocity", "1-s")
TRIGFLOW = Parameterization("trigflow", "F", "t")
VP_EPS = Parameterization("vp", "eps", "log_snr")
VP_V = Parameterization("vp", "v", "log_snr")
VP_X0 = Parameterization("vp", "x0", "log_snr")

# What recipes may name.
PRESETS = {
    "DIT": DIT, "EDM": EDM, "EDM_DENOISER": EDM_DENOISER, "RECTIFIED_FLOW": RECTIFIED_FLOW, "SIT": SIT, "TRIGFLOW": TRIGFLOW,
    "VP_EPS": VP_EPS, "VP_V": VP_V, "VP_X0": VP_X0,
}  # fmt: skip
