"""Drawing samples: deterministic teacher solvers and multistep consistency sampling, with one seed per sample."""

import math
from collections.abc import Callable, Iterator
from numbers import Integral

import torch
from torch import Tensor

from distill import trigflow
from distill.device import PRECISIONS, autocast
from distill.prompts import Prompts
from distill.schedule import check_times, sample_seeds, student_times
from teachers import Teacher
from teachers.condition import Condition, Embeddings, integer_labels


class SampleNoise:
    """A noise stream for every sample: the ``k``-th call gives each sample the ``k``-th draw of its own generator."""

    def __init__(self, generators: list[torch.Generator], sample_shape: tuple[int, ...], sigma_data: float, device):
        self.generators, self.sample_shape = generators, sample_shape
        self.sigma_data, self.device = sigma_data, device

    def __call__(self) -> Tensor:
        """``(N, C, H, W)`` from ``N(0, sigma_data^2)``, fp32, drawn on the CPU whatever the device."""
        draws = [torch.randn(self.sample_shape, generator=g, device=g.device).cpu() for g in self.generators]
        return self.sigma_data * torch.stack(draws).to(self.device)


def seeded_noise(model: Teacher, seeds: list[int]) -> SampleNoise:
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return SampleNoise(generators, model.sample_shape, model.sigma_data, device_of(model))


def device_of(model: torch.nn.Module) -> torch.device:
    """Where the weights are; the CPU if there are none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@torch.no_grad()
def consistency_sample(
    network: Callable[[Tensor, Tensor], Tensor], noise: Callable[[], Tensor], times: list[float], sigma_data: float
) -> Tensor:
    """Multistep consistency sampling (arXiv 2303.01469, Algorithm 1, in TrigFlow form).

    ``x0 = f(x_t, t)`` from pure noise at ``times[0]``; then for each later time new noise is added and ``f`` applied
    again. ``network(x_t, t)`` returns ``F``; ``noise()`` gives ``(N, C, H, W)`` scaled by ``sigma_data``.
    """
    x_t = noise()
    for i, time in enumerate(times):
        t = torch.full((len(x_t),), time, device=x_t.device)
        if i > 0:
            x_t = trigflow.perturb(x0, noise(), t)  # noqa: F821 (set by the step before)
        x0 = trigflow.consistency_function(x_t, network(x_t, t), t, sigma_data)
    return x0


def sample_student(
    student: Teacher,
    seeds: list[int],
    labels: Condition | None = None,
    num_inference_steps: int = 2,
    times: list[float] | None = None,
    guidance: float | None = None,
) -> Tensor:
    """Samples ``(N, C, H, W)`` fp32, not clamped, one per seed.

    Args:
        labels: ``(N,)``; required for a class-conditional student.
        times: sampling times in radians instead of the defaults of :func:`student_times`.
        guidance: guidance scale, of a student that takes it as an input and only there.

    Raises:
        ValueError: bad times, labels or guidance, each with what is allowed.
    """
    labels = check_condition(student, labels, len(seeds))
    if guidance is not None and not student.accepts_guidance:
        raise ValueError("this student was distilled at a fixed guidance scale; it takes no guidance_scale")
    if guidance is None and student.accepts_guidance:
        raise ValueError("this student takes the guidance scale as an input and needs a guidance_scale")
    times = student_times(num_inference_steps, student.sigma_data) if times is None else times
    check_times(times)
    scale = None if guidance is None else torch.full((len(seeds),), float(guidance), device=device_of(student))
    with evaluation_mode(student):
        return consistency_sample(
            lambda x, t: student(x, t, labels, scale), seeded_noise(student, seeds), times, student.sigma_data
        )


class evaluation_mode:
    """Context that puts a module in eval mode and restores what it was."""

    def __init__(self, module: torch.nn.Module):
        self.module, self.training = module, module.training

    def __enter__(self):
        self.module.eval()

    def __exit__(self, *exception):
        self.module.train(self.training)


def check_condition(model: Teacher, labels: Condition | Prompts | list[int] | None, num: int) -> Condition | Prompts | None:
    """Labels or prompts on the model's device, checked: one per sample, each a class or what the text encoder gives.
    Prompts on the disk stay there.
    """
    if model.text_condition is not None:
        return check_prompts(model, labels, num)
    if isinstance(labels, Embeddings | Prompts):
        raise ValueError(f"{model.source or 'this model'} takes no text embeddings")
    if labels is None:
        if model.num_classes is not None:
            raise ValueError(f"this model is class-conditional and needs labels 0 to {model.num_classes - 1}")
        return None
    labels = integer_labels(labels, "labels").to(device_of(model))
    if labels.shape != (num,):
        raise ValueError(f"{num} samples need {num} labels, got {labels.numel()}")
    model.check_labels(labels)
    if (labels == model.num_classes).any():  # the null class is for guidance; a student was never trained on it
        raise ValueError(f"label {model.num_classes} is out of range: this model has classes 0 to {model.num_classes - 1}")
    return labels


def check_prompts(model: Teacher, prompts: Embeddings | Prompts | None, num: int) -> Embeddings | Prompts:
    """As :func:`check_condition`, for a network of texts."""
    if prompts is None:
        raise ValueError("this model is conditioned on text and needs the embeddings of a prompt for each sample")
    if isinstance(prompts, Prompts):
        model.check_text(prompts.null)
        return prompts
    model.check_text(prompts)
    if len(prompts) != num:
        raise ValueError(f"{num} samples need {num} prompts, got {len(prompts)}")
    return prompts.to(device_of(model))


def sigma_grid(num_inference_steps: int, sigma_min=0.002, sigma_max=80.0, rho=7.0) -> Tensor:
    """EDM's noise levels, fp64 ``(n + 1,)``, decreasing, with 0 at the end (arXiv 2206.00364, equation 5)."""
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
    ramp = torch.linspace(0, 1, num_inference_steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])


def denoiser(model: Teacher, labels: Condition | None, guidance: float | Tensor | None = None) -> Callable:
    """EDM's ``D(x_sigma, sigma)`` of a model, for ``x_sigma = x_t / cos(t)`` and ``sigma``, a scalar or ``(B, 1, ..., 1)``;
    ``guidance``, one scale or ``(B,)``, in place of the model's own.
    """

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        t = trigflow.time_from_sigma(sigma.double().flatten(), model.sigma_data).expand(len(x)).to(x.device)
        x_t = x * trigflow.expand(t.cos(), x).to(x.dtype)
        F = model(x_t, t, labels, None if guidance is None else torch.zeros_like(t) + guidance)
        return trigflow.consistency_function(x_t, F, t, model.sigma_data).to(x.dtype)

    return denoise


def heun(denoise: Callable, x: Tensor, sigmas: Tensor) -> Tensor:
    """EDM's deterministic second-order solver from ``sigmas[0]`` to ``sigmas[-1]`` (arXiv 2206.00364, Algorithm 1).

    ``sigmas`` are scalars, or one for each sample, ``(steps + 1, B, 1, ..., 1)``.
    """
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        slope = (x - denoise(x, sigma)) / sigma
        euler = x + (sigma_next - sigma) * slope
        if (sigma_next == 0).all():
            return euler
        slope_next = (euler - denoise(euler, sigma_next)) / sigma_next
        x = x + (sigma_next - sigma) * (slope + slope_next) / 2
    return x


def exponential_adams(denoise: Callable, x: Tensor, sigmas: Tensor) -> Tensor:
    """Second-order exponential Adams method with corrector: the PF-ODE in ``log sigma`` with ``D`` linear over each step,
    first extrapolated, then interpolated once the end has been evaluated (as UniPC, arXiv 2302.04867): one evaluation each.

    For a few long steps the most accurate of the solvers here. ``sigmas`` are positive, as those of :func:`heun`.
    """
    x0, slope = denoise(x, sigmas[0]), 0.0
    last = len(sigmas) - 2
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        shrink, step = sigma_next / sigma, (sigma / sigma_next).log()
        constant, weight = shrink * x + (1 - shrink) * x0, step - 1 + shrink
        x = constant + weight * slope
        if i < last:
            x0_next = denoise(x, sigma_next)
            slope = (x0_next - x0) / step
            x, x0 = constant + weight * slope, x0_next
    return x


def dpmpp_2m(denoise: Callable, x: Tensor, sigmas: Tensor) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2) in EDM's noise levels: one evaluation a step."""
    previous, previous_step = None, None
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        x0 = denoise(x, sigma)
        if sigma_next == 0:
            return x0
        step = (sigma / sigma_next).log()  # h, the step in half log-SNR
        estimate = x0
        if previous is not None:
            ratio = previous_step / step
            estimate = (1 + 1 / (2 * ratio)) * x0 - previous / (2 * ratio)
        x = (sigma_next / sigma) * x - torch.expm1(-step) * estimate
        previous, previous_step = x0, step
    return x


SOLVERS = {"heun": heun, "dpmpp_2m": dpmpp_2m}


def count_evaluations(num_inference_steps: int, solver: str = "heun") -> int:
    """Network evaluations (NFE) of a teacher solver, without the second one of classifier-free guidance."""
    return 2 * num_inference_steps - 1 if solver == "heun" else num_inference_steps


@torch.no_grad()
def sample_teacher(
    teacher: Teacher,
    seeds: list[int],
    labels: Condition | None = None,
    num_inference_steps: int = 18,
    solver: str = "heun",
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    guidance: float | None = None,
) -> Tensor:
    """Deterministic samples ``(N, C, H, W)`` fp32, not clamped, from the noise that a student with these seeds gets.

    ``heun`` with 18 steps is 35 evaluations; ``guidance`` replaces the teacher's ``guidance_scale``. Raises
    ``ValueError`` on an unknown solver, bad steps or labels.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}; allowed: {', '.join(SOLVERS)}")
    labels = check_condition(teacher, labels, len(seeds))
    sigmas = sigma_grid(num_inference_steps, sigma_min, sigma_max, rho)
    z = seeded_noise(teacher, seeds)()
    x = z / math.cos(trigflow.max_time(teacher.sigma_data, sigma_max))
    with evaluation_mode(teacher):
        return SOLVERS[solver](denoiser(teacher, labels, guidance), x, sigmas)


@torch.no_grad()
def solve_ode(teacher: Teacher, x_t: Tensor, t: float, labels: Condition | None, num_inference_steps: int = 40) -> Tensor:
    """The end at time 0 of the PF-ODE through ``x_t`` ``(B, C, H, W)`` at time ``t``, by Heun's method."""
    sigma = float(trigflow.sigma_from_time(torch.tensor(t, dtype=torch.float64), teacher.sigma_data))
    sigmas = sigma_grid(num_inference_steps, sigma_max=sigma)
    with evaluation_mode(teacher):
        return heun(denoiser(teacher, labels), x_t / math.cos(t), sigmas)


def cycle_labels(model: Teacher, num: int) -> Tensor | None:
    """Labels 0, 1, ..., C - 1, 0, ... for a class-conditional model."""
    return None if model.num_classes is None else torch.arange(num) % model.num_classes


def generate(
    model: Teacher,
    num: int,
    *,
    num_inference_steps: int,
    role: str,
    labels: Condition | Prompts | list[int] | None = None,
    seed: int = 0,
    batch_size: int = 250,
    times: list[float] | None = None,
    guidance: float | None = None,
    solver: str = "heun",
    mixed_precision: str = "no",
) -> Iterator[tuple[Tensor, Condition | None]]:
    """Batches of images ``(B, C, H, W)`` clamped to [-1, 1], or of latents as they are, and their labels, ``num`` in all.

    Args:
        role: ``"teacher"`` (``num_inference_steps`` counts solver steps) or ``"student"`` (it counts evaluations).
        labels: one per image; by default they cycle through the classes. A folder of prompts is gone through in order,
            again from its start after its end.
        guidance: classifier-free guidance scale of a teacher, or the input of a student that has one.
        solver: of a teacher: ``heun`` (2n - 1 evaluations) or ``dpmpp_2m`` (n evaluations).
        mixed_precision: ``no`` or ``bf16``, in which the network then computes; steps between its evaluations stay fp32.

    Raises:
        ValueError: at once, before anything is drawn: bad numbers, times or labels.
    """
    numbers = {"num": num, "num_inference_steps": num_inference_steps, "seed": seed, "batch_size": batch_size}
    for name, value in numbers.items():
        if not isinstance(value, Integral):
            raise ValueError(f"{name} must be an integer, got {value!r}")
    if num < 1:
        raise ValueError(f"the number of samples must be at least 1, got {num}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}; allowed: {', '.join(SOLVERS)}")
    if mixed_precision not in PRECISIONS:
        raise ValueError(f"mixed_precision is {mixed_precision!r}; allowed: {', '.join(PRECISIONS)}")
    if role == "student" and solver != "heun":
        raise ValueError(f"solver {solver!r} is for a teacher; a student solves no ODE")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be from 0 to 2^63 - 1, got {seed}")
    if guidance is not None and not math.isfinite(guidance):
        raise ValueError(f"guidance_scale must be a finite number, got {guidance}")
    seeds = sample_seeds(num, torch.Generator().manual_seed(seed))
    labels = check_condition(model, cycle_labels(model, num) if labels is None else labels, num)
    if role == "teacher":
        sigma_grid(num_inference_steps)
    elif times is None:
        times = student_times(num_inference_steps, model.sigma_data)
    return draw(model, seeds, labels, num_inference_steps, role, batch_size, times, guidance, solver, mixed_precision)


def draw(model, seeds, labels, num_inference_steps, role, batch_size, times, guidance, solver, mixed_precision):
    """The iterator behind :func:`generate`."""
    device = device_of(model)
    for start in range(0, len(seeds), batch_size):
        part = slice(start, min(start + batch_size, len(seeds)))
        y = None if labels is None else labels[part]
        with autocast(mixed_precision, device):
            if role == "teacher":
                images = sample_teacher(model, seeds[part], y, num_inference_steps, solver, guidance=guidance)
            else:
                images = sample_student(model, seeds[part], y, num_inference_steps, times, guidance)
        yield (images if model.latents else images.clamp(-1, 1)), y


def search_times(score: Callable[[list[float]], float], times: list[float], rounds: int = 2) -> tuple[list[float], float]:
    """Intermediate times that minimise ``score(times)``, by coordinate descent on a grid that is then refined.

    Args:
        score: lower is better, for example a Fréchet distance at fixed seeds.
        times: where to start; ``times[0]`` stays.
        rounds: each round tries 7 values per coordinate between its neighbours, the next one within a third of that.

    Returns:
        The best times found and their score.
    """
    check_times(times)
    times, best = list(times), score(times)
    width = 1.0
    for _ in range(rounds):
        for i in range(1, len(times)):
            low = times[i + 1] if i + 1 < len(times) else 0.0
            span = (times[i - 1] - low) * width / 2
            center = times[i]
            for k in (-3, -2, -1, 1, 2, 3):
                trial = [*times[:i], center + span * k / 3.5, *times[i + 1 :]]
                if not low < trial[i] < times[i - 1]:
                    continue
                value = score(trial)
                if value < best:
                    times, best = trial, value
        width /= 3
    return times, best
