"""Every teacher convention against the analytic Gaussian mixture, in fp64."""

import json
import math

import numpy as np
import pytest
import torch
from torch import distributions

import teachers
from teachers import Parameterization


def times(sigma_data):
    return [math.atan(0.002 / sigma_data), 0.05, 0.3, 0.8, 1.1, 1.4, 1.55, math.atan(80 / sigma_data)]


VP_SDE = dict(beta_d=19.9, beta_min=0.1, M=1000)
COSINE = dict(C_2=0.008, M=1000)


CONVENTIONS = [
    Parameterization("edm", "raw", "log_sigma/4"),
    Parameterization("edm", "raw", "log_sigma/4", time_scale=1000.0, teacher_sigma_data=0.8),
    Parameterization("edm", "x0", "sigma"),
    Parameterization("edm", "-eps", "log(sigma/2)"),
    Parameterization("vp", "eps", "linear_beta", schedule=VP_SDE),
    Parameterization("vp", "eps", "cosine", schedule=COSINE),
    Parameterization("vp", "eps", "t", time_scale=1000.0),
    *[
        Parameterization("vp", prediction, time)
        for prediction in ("eps", "v", "x0", "score")
        for time in ("log_snr", "t", "-2log(alpha)")
    ],
    Parameterization("vp", "score", "-2log(alpha)", time_scale=1000.0),
    *[
        Parameterization("flow", prediction, time, scale)
        for prediction in ("velocity", "-velocity")
        for time, scale in (("s", 1.0), ("1-s", 1.0), ("s", 1000.0))
    ],
    Parameterization("trigflow", "F", "t"),
    Parameterization("trigflow", "F", "t", time_scale=1000.0),
]

# alpha^2 after each of DDPM's steps, multiplied out by hand, and its log-SNR.
STEPS = np.arange(1000)
KEPT = np.array([np.prod(1 - np.linspace(1e-4, 0.02, 1000)[: k + 1]) for k in STEPS])
LOG_SNR = np.log(KEPT / (1 - KEPT))


def name(p):
    return f"{p.family}-{p.prediction}-{p.time}-{p.time_scale:g}"


@pytest.mark.parametrize("sigma_data", [0.5, 0.616, 1.0])
@pytest.mark.parametrize("p", CONVENTIONS, ids=name)
def test_map_equals_the_exact_network(mixture, mixture_network, p, sigma_data):
    native = mixture_network(mixture, p, p.teacher_sigma_data or sigma_data)
    teacher = teachers.wrap(native, p, sigma_data, (2, 1, 1))
    generator = torch.Generator().manual_seed(0)
    for time in times(sigma_data):
        t = torch.full((32,), time, dtype=torch.float64)
        z = sigma_data * torch.randn(32, 2, 1, 1, generator=generator, dtype=torch.float64)
        x_t = math.cos(time) * mixture.sample(32, generator) + math.sin(time) * z
        exact = mixture.F(x_t, t, sigma_data)
        error = (teacher(x_t, t) - exact).abs().max() / exact.abs().max()
        # 1e-9 everywhere: fp64 leaves room even where eps (near pi/2) and x0 (near 0) lose digits.
        assert error < 1e-9, f"t = {time}: {error}"


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_a_network_of_ddpm_steps_is_the_exact_network(mixture, mixture_network, prediction, sigma_data):
    """On the steps, from the first (sigma/alpha 0.01) to the last (157)."""
    p = Parameterization("vp", prediction, "ddpm_linear", schedule=teachers.DIT.schedule)
    teacher = teachers.wrap(mixture_network(mixture, p, sigma_data), p, sigma_data, (2, 1, 1))
    generator = torch.Generator().manual_seed(0)
    for log_snr in LOG_SNR[[0, 1, 20, 250, 500, 750, 998, 999]] * (1 - 1e-12):
        t = torch.full((32,), math.atan(math.exp(-log_snr / 2) / sigma_data), dtype=torch.float64)
        x_t = torch.randn(32, 2, 1, 1, generator=generator, dtype=torch.float64)
        exact = mixture.F(x_t, t, sigma_data)
        assert (teacher(x_t, t) - exact).abs().max() < 1e-8 * exact.abs().max(), f"log-SNR {log_snr}"


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_ddpm_steps_lie_on_its_schedule(sigma_data):
    """At the time whose signal-to-noise ratio is that of ``sqrt(kept) x0 + sqrt(1 - kept) eps`` at step k, it is k."""
    t = torch.from_numpy(np.arctan(np.sqrt((1 - KEPT) / KEPT) / sigma_data))
    steps = teachers.DIT.coefficients(t, sigma_data).time
    torch.testing.assert_close(steps, torch.from_numpy(STEPS).double(), rtol=0, atol=1e-7)
    ends = teachers.DIT.coefficients(torch.tensor([0.0, 1e-4, torch.pi / 2], dtype=torch.float64), sigma_data).time
    assert ends.tolist() == [0.0, 0.0, 999.0]  # never a step that was not trained


def rk4(slope, x, start, stop, steps):
    h = (stop - start) / steps
    for i in range(steps):
        s = start + i * h
        k1 = slope(x, s)
        k2 = slope(x + h / 2 * k1, s + h / 2)
        k3 = slope(x + h / 2 * k2, s + h / 2)
        k4 = slope(x + h * k3, s + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def full(value):
    return torch.full((16,), value, dtype=torch.float64)


# Each teacher's own ODE: convention, dy/dtau of its network's output, tau(t), and y / x_t; sigma_data is 0.7.
SD = 0.7
ODES = {
    "edm: dy/dsigma = (y - D) / sigma": (
        teachers.EDM_DENOISER,
        lambda native, y, sigma: (y - native(y, full(sigma))) / sigma,
        lambda t: SD * math.tan(t),
        lambda t: 1 / math.cos(t),
    ),
    "vp: dy/dangle = v": (
        Parameterization("vp", "v", "t"),
        lambda native, y, angle: native(y, full(angle)),
        lambda t: math.atan(SD * math.tan(t)),
        lambda t: 1 / math.hypot(math.cos(t), SD * math.sin(t)),
    ),
    "vp-sde with beta = 1: dy/dtau = -(y + score) / 2": (
        Parameterization("vp", "score", "-2log(alpha)"),
        lambda native, y, tau: -(y + native(y, full(tau))) / 2,
        lambda t: math.log1p((SD * math.tan(t)) ** 2),
        lambda t: 1 / math.hypot(math.cos(t), SD * math.sin(t)),
    ),
    "flow: dy/ds = v": (
        teachers.RECTIFIED_FLOW,
        lambda native, y, s: native(y, full(s)),
        lambda t: SD * math.sin(t) / (math.cos(t) + SD * math.sin(t)),
        lambda t: 1 / (math.cos(t) + SD * math.sin(t)),
    ),
    "sit: dy/dtau = x0 - eps": (
        teachers.SIT,
        lambda native, y, tau: native(y, full(tau)),
        lambda t: math.cos(t) / (math.cos(t) + SD * math.sin(t)),
        lambda t: 1 / (math.cos(t) + SD * math.sin(t)),
    ),
}


@pytest.mark.parametrize("ode", ODES)
def test_both_odes_follow_the_same_curve(mixture, mixture_network, ode):
    """The teacher's own ODE and TrigFlow's ``dx/dt = sigma_data F`` end at the same point."""
    p, slope, tau, scale = ODES[ode]
    native = mixture_network(mixture, p, SD)
    teacher = teachers.wrap(native, p, SD, (2, 1, 1))
    t0, t1 = 1.2, 0.2
    x = torch.randn(16, 2, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    end = rk4(lambda x, t: SD * teacher(x, full(t)), x, t0, t1, 300)
    native_end = rk4(lambda y, s: slope(native, y, s), x * scale(t0), tau(t0), tau(t1), 300)
    torch.testing.assert_close(end * scale(t1), native_end, rtol=0, atol=1e-7)
    assert (end - x).abs().max() > 0.1


def test_the_mixture_is_its_own_score(mixture):
    """What everything here is measured against, by Tweedie: ``E[x0 | y] = (y + sigma^2 grad log p(y)) / alpha``."""
    alpha, sigma = 0.6, 0.4
    spread = (alpha**2 * mixture.variances + sigma**2).sqrt()[:, None].expand(3, 2)
    components = distributions.Independent(distributions.Normal(alpha * mixture.means, spread), 1)
    density = distributions.MixtureSameFamily(distributions.Categorical(mixture.weights), components)
    y = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
    (score,) = torch.autograd.grad(density.log_prob(y).sum(), y)
    x0, eps = (v.flatten(1) for v in mixture.posterior(y.detach().view(8, 2, 1, 1), alpha, sigma))
    torch.testing.assert_close(x0, (y + sigma**2 * score).detach() / alpha, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(eps, -sigma * score, rtol=1e-10, atol=1e-12)


def test_edm_network_is_minus_trigflow_network(mixture):
    x, t = torch.randn(4, 2, 1, 1, dtype=torch.float64), torch.tensor([0.1, 0.5, 1.0, 1.5], dtype=torch.float64)
    c = teachers.EDM.coefficients(t, 0.5)
    u = torch.randn_like(x)
    torch.testing.assert_close(teachers.EDM.to_trigflow(u, x, t, c, 0.5), -u, rtol=1e-13, atol=1e-13)


def test_trigflow_networks_are_called_as_the_paper_calls_them(mixture, mixture_network):
    """``F(x_t / sigma_data, t)`` (equation 3), unchanged."""
    native = mixture_network(mixture, teachers.TRIGFLOW, SD)
    teacher = teachers.wrap(native, teachers.TRIGFLOW, SD, (2, 1, 1))
    x, t = torch.randn(3, 2, 1, 1, dtype=torch.float64), torch.tensor([0.0, 0.7, math.pi / 2], dtype=torch.float64)
    inner = torch.tensor([0.01, 0.7, 1.56], dtype=torch.float64)
    torch.testing.assert_close(teacher(x, inner), native(x / SD, inner), rtol=1e-12, atol=1e-12)
    c = teachers.TRIGFLOW.coefficients(t, SD)
    u = torch.randn_like(x)
    torch.testing.assert_close(teachers.TRIGFLOW.to_trigflow(u, x, t, c, SD), u, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("p", [*CONVENTIONS, teachers.DIT], ids=name)
def test_the_map_and_its_time_derivative_are_finite_on_the_sampling_range(p):
    t = torch.tensor(times(0.5), dtype=torch.float64)
    x, u = torch.randn(2, len(t), 2, 1, 1, dtype=torch.float64)
    out = torch.func.jvp(lambda t: p.to_trigflow(u, x, t, p.coefficients(t, 0.5), 0.5), (t,), (t.cos() * t.sin(),))
    assert all(v.isfinite().all() for v in out)


def test_the_map_of_a_score_is_finite_at_time_zero():
    """At t = 0 ``b`` is cut off, and a score that stays finite there says ``F = -sigma score = 0``."""
    p = Parameterization("vp", "score", "-2log(alpha)")
    t = torch.zeros(2, dtype=torch.float64)
    x, u = torch.randn(2, 2, 2, 1, 1, dtype=torch.float64)
    c, tangents = torch.func.jvp(lambda t: p.coefficients(t, 0.5), (t,), (torch.ones_like(t),))
    assert all(v.isfinite().all() for v in (*c, *tangents))
    assert p.to_trigflow(u, x, t, c, 0.5).abs().max() < 1e-6


@pytest.mark.parametrize("p", CONVENTIONS, ids=name)
def test_rearranged_time_tangents_are_finite_differences(p):
    """``cos(t) sin(t) dc/dt`` of every time signal, and of the input scale and targets, over the whole sampling range."""
    t = torch.linspace(math.atan(0.002 / 0.5), math.atan(80 / 0.5), 200, dtype=torch.float64)
    speed = t.cos() * t.sin()
    stack = lambda t: torch.stack(p.coefficients(t, 0.5))  # noqa: E731
    tangent = torch.func.jvp(stack, (t,), (speed,))[1]
    assert tangent.isfinite().all()
    difference = (stack(t + 1e-5 * speed) - stack(t - 1e-5 * speed)) / 2e-5
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-6 * p.time_scale)


def test_the_cosine_step_is_that_of_improved_ddpm():
    """``u_j`` by the recursion of EDM's Table 1: the time signal at noise ``u_j`` is the whole step ``M - 1 - j``."""
    M, C_1, C_2, sigma_data = 1000, 0.001, 0.008, 0.5
    alpha_bar = lambda j: math.sin(math.pi / 2 * j / M / (C_2 + 1)) ** 2  # noqa: E731
    u = [0.0] * (M + 1)
    for j in range(M, 0, -1):
        u[j - 1] = math.sqrt((u[j] ** 2 + 1) / max(alpha_bar(j - 1) / alpha_bar(j), C_1) - 1)
    assert round(u[8], 1) == 80.2 and round(u[0]) == 20291 and round(u[M - 1], 4) == 0.0064
    p = Parameterization("vp", "eps", "cosine", schedule=COSINE)
    t = torch.tensor(u[1:M], dtype=torch.float64).div(sigma_data).atan()
    steps = torch.arange(M - 2, -1, -1, dtype=torch.float64)
    torch.testing.assert_close(p.coefficients(t, sigma_data).time, steps, rtol=0, atol=1e-6)


def test_the_vp_sde_step_inverts_its_noise_level(mixture_network):
    p = Parameterization("vp", "eps", "linear_beta", schedule=VP_SDE)
    steps = torch.tensor([0.01, 1.0, 50.0, 400.0, 900.0, 999.0], dtype=torch.float64)
    noise = mixture_network.noise["linear_beta"](steps)
    assert round(noise[-1].item(), 1) == 152.2
    torch.testing.assert_close(p.coefficients((noise / 0.7).atan(), 0.7).time, steps, rtol=1e-9, atol=0)


@pytest.mark.parametrize("p", CONVENTIONS, ids=name)
def test_dictionary_round_trip(p):
    assert Parameterization(**json.loads(json.dumps(p.to_dict()))) == p


def test_rearranged_time_tangents():
    """``cos sin dc/dt`` is 1/4 for EDM's noise embedding, 1 for the VE-SDE's, ``s (1 - s)`` for rectified flow."""
    t = torch.linspace(0.004, 1.5645, 50, dtype=torch.float64)
    for p, expected in (
        (teachers.EDM, lambda c: torch.full_like(t, 0.25)),
        (Parameterization("edm", "-eps", "log(sigma/2)"), torch.ones_like),
        (teachers.RECTIFIED_FLOW, lambda s: s * (1 - s)),
    ):
        time, tangent = torch.func.jvp(lambda t: p.coefficients(t, 0.5).time, (t,), (t.cos() * t.sin(),))  # noqa: B023
        torch.testing.assert_close(tangent, expected(time), rtol=1e-10, atol=1e-12)


def test_guidance_commutes_with_the_map():
    t = torch.tensor([0.4, 1.3], dtype=torch.float64)
    x, u, v = torch.randn(3, 2, 2, 1, 1, dtype=torch.float64)
    p = teachers.RECTIFIED_FLOW
    c = p.coefficients(t, 0.5)
    F = lambda u: p.to_trigflow(u, x, t, c, 0.5)  # noqa: E731
    torch.testing.assert_close(F(u + 2.5 * (v - u)), F(u) + 2.5 * (F(v) - F(u)))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("ddpm", "eps", "t"), "family is 'ddpm'; allowed: edm, vp, flow, trigflow"),
        (("edm", "eps", "sigma"), "prediction is 'eps'; family 'edm' allows: raw, x0, -eps"),
        (("flow", "velocity", "t"), "time signal is 't'; family 'flow' allows: trigflow, s, 1-s"),
        (("flow", "velocity", "s", 1.0, 0.5), "teacher_sigma_data belongs to"),
        (("edm", "x0", "sigma", 1.0, 0.5), "teacher_sigma_data belongs to"),
        (("edm", "raw", "log_sigma/4", 1.0, -0.5), "teacher_sigma_data must be positive, got -0.5"),
        (("flow", "velocity", "s", 0.0), "time_scale must be positive, got 0.0"),
        (("vp", "eps", "linear_beta"), "time signal 'linear_beta' needs the schedule beta_d, beta_min, M, got None"),
        (("vp", "eps", "cosine", 1.0, None, {"M": 9}), "time signal 'cosine' needs the schedule C_2, M, got"),
        (("vp", "eps", "cosine", 1.0, None, {"M": 0, "C_2": 1}), "schedule: M must be a positive number, got 0"),
        (("vp", "eps", "cosine", 1.0, None, {"M": 9, "C_2": "a"}), "schedule: C_2 must be a positive number, got 'a'"),
        (("vp", "eps", "t", 1.0, None, COSINE), "time signal 't' needs the schedule None, got"),
    ],
)
def test_impossible_conventions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Parameterization(*arguments)
