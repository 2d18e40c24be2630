import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import teachers
from distill import sampling, trigflow
from distill.schedule import sample_seeds, student_times

SD = 0.5


class AnalyticF(nn.Module):
    """The exact network of the mixture, counting its calls."""

    def __init__(self, mixture):
        super().__init__()
        self.mixture, self.calls = mixture, 0
        self.anchor = nn.Parameter(torch.zeros(1))  # tells the samplers the device

    def forward(self, x, time):
        self.calls += 1
        return self.mixture.F(x.double() * SD, time.double(), SD).to(x.dtype)


@pytest.fixture
def analytic(mixture):
    return teachers.wrap(AnalyticF(mixture), teachers.TRIGFLOW, SD, (2, 1, 1))


def test_heun_is_of_second_order_and_counts_its_evaluations(analytic):
    seeds = list(range(64))
    # A sampler's fp32 state limits the accuracy; a moderate sigma_max keeps the comparison in reach.
    solve = lambda n: sampling.sample_teacher(analytic, seeds, None, n, sigma_max=20.0)  # noqa: E731
    exact = solve(400)
    errors = [(solve(n) - exact).square().mean().sqrt().item() for n in (20, 40)]
    assert errors[0] / errors[1] > 3, errors
    analytic.native.calls = 0
    solve(18)
    assert analytic.native.calls == sampling.count_evaluations(18) == 35


def test_dpmpp_converges_to_the_same_samples(analytic):
    seeds = list(range(64))
    exact = sampling.sample_teacher(analytic, seeds, None, 400, sigma_max=20.0)
    error = lambda n: (  # noqa: E731
        (sampling.sample_teacher(analytic, seeds, None, n, "dpmpp_2m", sigma_max=20.0) - exact).square().mean().sqrt()
    )
    assert error(60) < 0.02 and error(30) / error(60) > 2.5
    analytic.native.calls = 0
    sampling.sample_teacher(analytic, seeds, None, 18, "dpmpp_2m")
    assert analytic.native.calls == sampling.count_evaluations(18, "dpmpp_2m") == 18


class GaussianF(nn.Module):
    """The exact diffusion network of data N(0, s^2), for which the PF-ODE is solved by hand."""

    def __init__(self, s):
        super().__init__()
        self.s = nn.Parameter(torch.tensor(s))

    def forward(self, x, time):
        t, x, s = time.double().view(-1, 1, 1, 1), x.double() * SD, self.s.double()
        variance = (s * t.cos()).square() + (SD * t.sin()).square()
        return (t.sin() * t.cos() * (SD**2 - s**2) * x / (variance * SD)).float()


@pytest.mark.parametrize("solver, order", [("heun", 2), ("dpmpp_2m", 2)])
def test_solvers_converge_to_the_closed_form_of_a_gaussian(solver, order):
    """Along the PF-ODE ``x_sigma / sqrt(s^2 + sigma^2)`` is constant, so noise ``z`` ends at a known place."""
    s, sigma_max, seeds = 0.3, 20.0, list(range(256))
    teacher = teachers.wrap(GaussianF(s), teachers.TRIGFLOW, SD, (1, 1, 1))
    z = torch.stack([torch.randn(1, 1, 1, generator=torch.Generator().manual_seed(i)) for i in seeds]) * SD
    x = z / math.cos(trigflow.max_time(SD, sigma_max))
    exact = x * s / math.sqrt(s**2 + sigma_max**2)
    errors = []
    for n in (10, 20, 40):
        end = sampling.sample_teacher(teacher, seeds, None, n, solver, sigma_max=sigma_max)
        errors.append((end - exact).square().mean().sqrt().item())
    rates = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(rate > order - 0.4 for rate in rates) and errors[-1] < 5e-3, (errors, rates)


def test_exponential_adams_with_a_noise_level_for_each_sample():
    """Second order, and in long steps far more accurate than the other solvers with the same evaluations."""
    s, teacher = 0.3, teachers.wrap(GaussianF(0.3), teachers.TRIGFLOW, SD, (1, 1, 1))
    high = torch.tensor([0.2, 1.0, 5.0, 40.0]).view(-1, 1, 1, 1)
    ratio = torch.tensor([2.0, 4.0, 8.0, 6.0]).view(-1, 1, 1, 1)
    low = high / ratio
    x = torch.ones(4, 1, 1, 1) * high
    exact = x * ((s**2 + low**2) / (s**2 + high**2)).sqrt()

    def error(solver, n):
        sigmas = high * ratio ** -torch.linspace(0, 1, n + 1).view(-1, 1, 1, 1, 1)
        with torch.no_grad():
            return ((solver(sampling.denoiser(teacher, None), x, sigmas) - exact) / high).abs().max().item()

    errors = [error(sampling.exponential_adams, n) for n in (4, 8, 16, 32)]
    assert all(a / b > 3 for a, b in pairwise(errors)), errors
    assert errors[0] < error(sampling.heun, 2) / 5, (errors, error(sampling.heun,2))


def test_teacher_samples_follow_the_data(analytic, mixture):
    x = sampling.sample_teacher(analytic, list(range(2000)), None, 30).flatten(1).double()
    nearest = torch.cdist(x, mixture.means).argmin(1)
    shares = torch.bincount(nearest, minlength=3) / len(x)
    torch.testing.assert_close(shares.double(), mixture.weights, atol=0.05, rtol=0)


class GaussianConsistency(nn.Module):
    """F of the exact consistency function of data N(0, s^2): f(x, t) = s x / sqrt(s^2 cos^2 + sd^2 sin^2)."""

    def __init__(self, s):
        super().__init__()
        self.s = nn.Parameter(torch.tensor(s))

    def forward(self, x, time):
        t, x = time.view(-1, 1, 1, 1), x * SD
        f = self.s * x / ((self.s * t.cos()).square() + (SD * t.sin()).square()).sqrt()
        return (t.cos() * x - f) / (t.sin() * SD)


def test_an_exact_consistency_function_samples_in_any_number_of_steps():
    student = teachers.wrap(GaussianConsistency(0.3), teachers.TRIGFLOW, SD, (1, 1, 1))
    for steps in (1, 2, 4):
        x = sampling.sample_student(student, list(range(20_000)), None, steps)
        assert abs(x.std().item() - 0.3) < 0.005 and abs(x.mean().item()) < 0.01


def test_student_sampling_is_the_written_out_loop(teacher):
    seeds, labels = [5, 6], torch.tensor([0, 2])
    times = student_times(2, SD)
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    noise = lambda: SD * torch.stack([torch.randn(1, 8, 8, generator=g) for g in generators])  # noqa: E731
    x = noise()
    with torch.no_grad():
        for i, time in enumerate(times):
            t = torch.full((2,), time)
            if i:
                x = math.cos(time) * x0 + math.sin(time) * noise()  # noqa: F821
            x0 = trigflow.consistency_function(x, teacher(x, t, labels), t, SD)
    torch.testing.assert_close(sampling.sample_student(teacher, seeds, labels, 2), x0)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_image_i_depends_on_neither_batch_size_nor_number(teacher, role):
    draw = lambda num, batch: torch.cat(  # noqa: E731
        [x for x, _ in sampling.generate(teacher, num, num_inference_steps=3, role=role, seed=7, batch_size=batch)]
    )
    whole = draw(7, 7)
    # Kernels sum in another order for another batch size; the solver amplifies that rounding from sigma = 80.
    torch.testing.assert_close(draw(7, 2), whole, rtol=0, atol=5e-4)
    torch.testing.assert_close(draw(3, 3), whole[:3], rtol=0, atol=5e-4)
    assert whole.abs().max() <= 1


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_in_bf16_the_network_computes_but_no_step(teacher, role):
    given, inside = set(), set()
    teacher.native.register_forward_pre_hook(lambda _, args: given.update(x.dtype for x in args[:2]))
    for layer in teacher.native.modules():
        layer.register_forward_hook(lambda layer, _, out: inside.add(out.dtype))
    options = dict(num_inference_steps=3, role=role, seed=7, batch_size=2)
    images = torch.cat([x for x, _ in sampling.generate(teacher, 4, **options)])
    assert torch.bfloat16 not in inside
    half = torch.cat([x for x, _ in sampling.generate(teacher, 4, mixed_precision="bf16", **options)])
    assert torch.bfloat16 in inside and torch.bfloat16 not in given
    assert half.dtype == torch.float32 and 0 < (half - images).norm() / images.norm() < 0.05


def test_between_batches_the_precision_is_the_callers(teacher):
    for _ in sampling.generate(teacher, 2, num_inference_steps=1, role="student", batch_size=1, mixed_precision="bf16"):
        assert not torch.is_autocast_enabled("cpu")


def test_sampling_leaves_the_training_mode_alone(teacher):
    teacher.train()
    sampling.sample_student(teacher, [0], torch.tensor([1]), 1)
    assert teacher.training


def test_seeds_do_not_depend_on_the_number():
    first = sample_seeds(5, torch.Generator().manual_seed(3))
    assert sample_seeds(50, torch.Generator().manual_seed(3))[:5] == first


@pytest.mark.parametrize("steps", range(1, 9))
def test_default_times_decrease_from_t_max(steps):
    times = student_times(steps, SD)
    assert len(times) == steps and times[0] == trigflow.max_time(SD)
    assert times == sorted(times, reverse=True) and times[-1] > 0
    assert student_times(2, SD)[1] == 1.1


def test_search_finds_the_best_time():
    times, score = sampling.search_times(lambda times: (times[1] - 0.77) ** 2, [1.56, 1.1], rounds=5)
    assert abs(times[1] - 0.77) < 0.01 and score < 1e-4 and times[0] == 1.56


def test_search_moves_every_intermediate_time():
    best = (1.25, 0.9, 0.35)
    score = lambda times: sum((a - b) ** 2 for a, b in zip(times[1:], best, strict=True))  # noqa: E731
    times, value = sampling.search_times(score, [1.56, 1.3, 1.1, 0.6], rounds=5)
    assert value == score(times) < 1e-3 and times == sorted(times, reverse=True)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(num_inference_steps=0), "num_inference_steps must be 1 to 8, got 0"),
        (dict(times=[1.0, 1.2]), "must decrease"),
        (dict(times=[2.0]), r"within \(0, pi/2\]"),
        (dict(labels=torch.tensor([0, 9])), "label 9 is out of range"),
        (dict(labels=torch.tensor([0])), "2 samples need 2 labels, got 1"),
        (dict(labels=[0.5, 1.5]), r"labels must be an integer or a list of integers, got \[0.5, 1.5\]"),
        (dict(labels=["a", "b"]), "labels must be an integer or a list"),
        (dict(labels=None), "class-conditional and needs labels"),
        (dict(guidance=2.0), "fixed guidance scale"),
    ],
)
def test_bad_student_arguments(teacher, kwargs, message):
    with pytest.raises(ValueError, match=message):
        sampling.sample_student(teacher, [0, 1], **{"labels": torch.tensor([0, 1]), **kwargs})


def test_bad_teacher_arguments(teacher):
    with pytest.raises(ValueError, match="solver is 'euler'; allowed: heun, dpmpp_2m"):
        sampling.sample_teacher(teacher, [0], torch.tensor([0]), 5, "euler")
    with pytest.raises(ValueError, match="num_inference_steps must be at least 1"):
        sampling.sample_teacher(teacher, [0], torch.tensor([0]), 0)
    with pytest.raises(ValueError, match="number of samples must be at least 1"):
        next(sampling.generate(teacher, 0, num_inference_steps=1, role="student"))


def test_guidance_scale_reaches_a_teacher(make_teacher):
    teacher = make_teacher("SongUNet")
    plain, guided = (sampling.sample_teacher(teacher, [0, 1], [0, 1], 2, guidance=g) for g in (None, 3.0))
    teacher.guidance_scale = 3.0
    assert torch.equal(guided, sampling.sample_teacher(teacher, [0, 1], [0, 1], 2)) and not torch.equal(guided, plain)
