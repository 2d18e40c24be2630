"""Whether a network was trained under the parameterization it is given: its denoising error tells, in a few evaluations.

With ``D(x_t, t) = cos(t) x_t - sin(t) sigma_data F`` (arXiv 2410.11081, equation 5) the error of denoising ``x_t`` is
divided by that of the best denoiser that knows no more of the data than their mean and standard deviation ``s``:

    error(t) = rms(D(x_t, t) - x0) / (s sigma / sqrt(s^2 + sigma^2)),    sigma = sigma_data tan(t).

The ideal network minimises the numerator, so it is never above 1, at any ``t``: at small ``t`` it returns its input, at
large ``t`` it is close to the mean of the data and varies less than they do. What a wrong parameterization does to it:

- an output taken for ``x0`` that is something else is off by about the scale of the data: error 3 to 50 at small ``t``;
- an output taken for ``eps`` that is something else, or a velocity of the wrong sign, leaves noise in ``D`` or adds to it: 2
  to 20 at large ``t``;
- a time that runs backwards, or is off by a factor of 1000, is wrong at one end at least: usually 1.2 to 3.

At small ``t`` the raw network of EDM and all velocities return their input whatever they predict, since little of the
output reaches ``D``; that is why the error is relative to the noise. A network that hardly looks at its time fits any time.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from teachers.base import Teacher
from teachers.condition import Condition
from teachers.parameterization import PREDICTIONS, PRESETS, SCHEDULES, TIMES, Parameterization

PROBE_TIMES = (0.1, 0.3, 0.8, 1.2, 1.45)  # radians
DRAWING_TANGENTS = (20.0, 6.0, 2.5, 1.2, 0.6, 0.3, 0.1)  # tan(t) of the steps in which the teacher draws its own samples
# A trained network is below CLEAR at every time, or below LIMIT where the data leave little to know. LIMIT is above 1 for
# the chance in a few samples.
CLEAR, LIMIT = 0.7, 1.1
# Above this in the mean a network knows next to nothing.
IGNORANT = 0.95
# What a better parameterization divides the mean error by, at least: of a network that denoises under the given one too, and
# of one that does not.
MUCH_BETTER, BETTER = 1.25, 1.05
SPREADS = (0.5, 2.0)  # standard deviation of a teacher's own samples over sigma_data


def num_probed(sample_shape: tuple[int, ...]) -> int:
    """How many images tell: 8, or as few as 2 of larger samples, of which each says more and costs more."""
    return min(8, max(2, 8 * 784 // math.prod(sample_shape)))


class Fit(NamedTuple):
    """How well a network denoises under one parameterization."""

    errors: list[float]  # one for each of PROBE_TIMES
    spread: float | None = None  # of the teacher's own samples

    @property
    def worst(self) -> float:
        low, high = SPREADS
        return max(self.errors) if self.spread is None or low <= self.spread <= high else math.inf

    @property
    def mean(self) -> float:
        """Geometric mean over the times."""
        return math.inf if self.worst == math.inf else math.exp(sum(map(math.log, self.errors)) / len(self.errors))

    @property
    def denoises(self) -> bool:
        return self.worst <= LIMIT and self.mean <= IGNORANT


def probe(teacher: Teacher, images: Tensor | None = None, labels: Condition | None = None) -> dict:
    """Check that the teacher's network denoises under its parameterization, and if not, whether it does under another one:
    of the same family (other prediction or sign, other time, time scaled by 1000 or 1/1000) or, on real images, a preset of
    any family.

    Guidance is left out. The teacher is refused only if another parameterization fits; one that denoises badly under all
    of them may be a poor teacher, or untrained, and gets a verdict that says so.

    Args:
        images: a few real ones ``(B, C, H, W)``, such as :func:`num_probed`. Without them the teacher draws its own:
            less certain, since a wrong parameterization is then judged by what it makes of noise.
        labels: of the images ``(B,)``; ``None`` for an unconditional teacher, or for the null class.

    Returns:
        ``denoising_error`` by time, ``judged_on`` (``real images`` or ``its own samples``) and ``verdict``, a sentence.

    Raises:
        ValueError: with the errors under the given and under the better parameterization; or a network whose output is not
            finite.
    """
    own = fit(teacher, images, labels)
    facts = {
        "denoising_error": {t: round(e, 2) for t, e in zip(PROBE_TIMES, own.errors, strict=True)},
        "judged_on": "its own samples" if images is None else "real images",
        "verdict": verdict(own),
    }
    if own.worst <= (LIMIT if images is None else CLEAR):
        return facts
    others = siblings(teacher.parameterization)
    if images is not None:  # of itself an untrained network draws what some family takes for denoised
        others += [p for p in PRESETS.values() if p not in (teacher.parameterization, *others)]
    fits = [(other, fit_of_twin(twin, images, labels)) for other, twin in twins(teacher, others)]
    _, best = min(fits, key=lambda item: (not item[1].denoises, item[1].mean))
    # Twins that are the same function differ by rounding: of these the first, which has a name.
    other, best = next(item for item in fits if item[1].denoises == best.denoises and item[1].mean <= 1.001 * best.mean)
    if best.denoises and best.mean * (MUCH_BETTER if own.denoises else BETTER) < own.mean:
        raise ValueError(
            f"{teacher.source or 'this teacher'} denoises badly under its parameterization "
            f"{name(teacher.parameterization)}: {describe(own)}; "
            f"under {other} it is {listed(best.errors)}, so that is likely the right one"
        )
    if math.inf in own.errors and (images is None or images.std() > 0):
        raise ValueError(
            f"{teacher.source or 'this teacher'} gives NaN or infinite values: its denoising error is "
            f"{listed(own.errors)} at t = {', '.join(map(str, PROBE_TIMES))}"
        )
    return facts


def verdict(own: Fit) -> str:
    """Of a network that does not denoise better under another parameterization."""
    if own.worst > LIMIT:
        return (
            f"warning: it denoises badly, as it does under the others of its family: {describe(own)}; it may be little "
            "trained, or its input scale, its labels or the family itself may be wrong"
        )
    if own.mean > IGNORANT:
        return (
            "warning: it denoises no better than knowing the data's mean and spread, so it is probably untrained: "
            f"{describe(own)}"
        )
    if own.worst > 1.05:  # below that it is chance
        return f"its parameterization may fit, though some errors are above 1: {describe(own)}"
    return f"its parameterization fits: {describe(own)}"


def siblings(p: Parameterization) -> list[Parameterization]:
    """The other parameterizations of a family that are easily taken for this one."""
    found = []
    for prediction in PREDICTIONS[p.family]:
        own_sigma_data = p.teacher_sigma_data if prediction == "raw" else None
        for time in times_with_the_constants_of(p):
            schedule = p.schedule if time in SCHEDULES else None
            found.append(replace(p, prediction=prediction, time=time, teacher_sigma_data=own_sigma_data, schedule=schedule))
    found += [replace(p, time_scale=p.time_scale * factor) for factor in (1000.0, 0.001)]
    return [other for other in found if other != p]


def times_with_the_constants_of(p: Parameterization) -> list[str]:
    """Time signals of a family that need no constants, or those that are there. That of a retrofitted network is its own."""
    usual = [time for time in TIMES[p.family] if SCHEDULES.get(time, ()) in ((), SCHEDULES.get(p.time))]
    return [time for time in usual if time != "trigflow" or p.time == time]


class Negated(nn.Module):
    """A network whose output has the other sign."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        for key in ("text_condition", "guidance_embedding", "null_class"):
            if hasattr(network, key):
                setattr(self, key, getattr(network, key))

    def forward(self, *args, **kwargs) -> Tensor:
        return -self.network(*args, **kwargs)


def twins(teacher: Teacher, others: list[Parameterization]) -> list[tuple[str, Teacher]]:
    """The same network as it would be under other parameterizations, and with its output negated, each with its name."""
    own = teacher.parameterization
    found = [(name(p), teacher.twin(parameterization=p, guidance_scale=1.0)) for p in others]
    negated = teacher.twin(native=Negated(teacher.native), guidance_scale=1.0)
    return [*found, (f"{name(own)} with the sign of its output changed", negated)]


def fit_of_twin(twin: Teacher, images: Tensor | None, labels: Condition | None) -> Fit:
    """:func:`fit` under another parameterization, which may give the network times that it cannot take."""
    try:
        return fit(twin, images, labels)
    except (RuntimeError, IndexError, ValueError, AssertionError):
        return Fit([math.inf] * len(PROBE_TIMES))


@torch.no_grad()
def fit(teacher: Teacher, images: Tensor | None, labels: Condition | None) -> Fit:
    """The teacher's denoising errors, in eval mode and with fixed noise."""
    training = teacher.training
    teacher.eval()
    try:
        noise = torch.Generator().manual_seed(0)
        if images is not None:
            return Fit(denoising_errors(teacher, images, labels, noise))
        images, labels = draw(teacher, noise)
        return Fit(denoising_errors(teacher, images, labels, noise), images.std().item() / teacher.sigma_data)
    finally:
        teacher.train(training)


def denoising_errors(teacher: Teacher, x0: Tensor, labels: Condition | None, noise: torch.Generator) -> list[float]:
    """``error(t)`` at each of ``PROBE_TIMES``; infinite where the network is not finite."""
    s, errors = x0.std().item(), []
    for t in PROBE_TIMES:
        x_t = math.cos(t) * x0 + math.sin(t) * gaussian(teacher, x0, noise)
        denoised = ddim_step(teacher, x_t, t, 0.0, labels)
        sigma = teacher.sigma_data * math.tan(t)
        error = (denoised - x0).double().square().mean().sqrt().item()
        known = s * sigma / math.hypot(s, sigma)
        errors.append(max(error / known, 1e-6) if s > 0 and math.isfinite(error) else math.inf)
    return errors


def draw(teacher: Teacher, noise: torch.Generator) -> tuple[Tensor, Condition | None]:
    """A few samples of the teacher's own by first-order steps, and their labels."""
    p = next(teacher.parameters(), torch.zeros(1))
    # Few dimensions need more samples for as good a mean.
    n = max(num_probed(teacher.sample_shape), 512 // math.prod(teacher.sample_shape))
    labels = teacher.example_condition(n, p.device)
    x = gaussian(teacher, torch.empty(n, *teacher.sample_shape, dtype=p.dtype, device=p.device), noise)
    times = [math.atan(tan) for tan in DRAWING_TANGENTS]
    for s, t in zip(times, [*times[1:], 0.0], strict=True):
        x = ddim_step(teacher, x, s, t, labels)
    return x, labels


def gaussian(teacher: Teacher, like: Tensor, noise: torch.Generator) -> Tensor:
    """Noise of ``N(0, sigma_data^2)``, drawn on the CPU whatever the device."""
    return (teacher.sigma_data * torch.randn(like.shape, generator=noise)).to(like)


def ddim_step(teacher: Teacher, x: Tensor, s: float, t: float, labels: Condition | None) -> Tensor:
    """Equation 26 for one time; to ``t = 0`` it is the denoiser."""
    F = teacher.evaluate(x, torch.full((len(x),), s, dtype=torch.float64, device=x.device), labels)
    return math.cos(s - t) * x - math.sin(s - t) * teacher.sigma_data * F


def name(p: Parameterization) -> str:
    """``VP_EPS`` for a preset, else the fields."""
    preset = next((key for key, value in PRESETS.items() if value == p), None)
    return preset or str(p).replace(", teacher_sigma_data=None", "").replace(", time_scale=1.0", "")


def listed(errors: list[float]) -> str:
    return ", ".join(f"{e:.2f}" for e in errors)


def describe(own: Fit) -> str:
    times = ", ".join(map(str, PROBE_TIMES))
    where = "" if own.spread is None else f" on its own samples (standard deviation {own.spread:.2f} sigma_data)"
    return f"denoising error {listed(own.errors)} at t = {times}{where}, where 1 is knowing the data's mean and spread only"
