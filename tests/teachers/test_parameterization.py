"""Every teacher convention against the analytic Gaussian mixture, in fp64."""

import math

import pytest
import torch
from torch import nn

import teachers
from teachers import Parameterization

TIMES = [math.atan(0.002 / 0.5), 0.05, 0.3, 0.8, 1.1, 1.4, 1.55, math.atan(80 / 0.5)]


class Native(nn.Module):
    """The network that a teacher of some convention would be if it had learned the mixture perfectly."""

    def __init__(self, mixture, p, own_sigma_data):
        super().__init__()
        self.mixture, self.p, self.own = mixture, p, own_sigma_data

    def forward(self, x, time):
        return getattr(self, self.p.family)(x, time / self.p.time_scale)

    def edm(self, x, time):
        if self.p.prediction == "x0":
            return self.mixture.posterior(x, 1.0, time)[0]
        sigma = (4 * time).exp()
        s, own = sigma.view(-1, 1, 1, 1), self.own
        norm = (s**2 + own**2).sqrt()
        y = x * norm
        denoised = self.mixture.posterior(y, 1.0, sigma)[0]
        return (denoised - own**2 / norm**2 * y) * norm / (s * own)

    def vp(self, x, time):
        if self.p.time == "log_snr":  # alpha^2 / sigma^2 = e^time
            alpha, sigma = torch.sigmoid(time).sqrt(), torch.sigmoid(-time).sqrt()
        else:
            alpha, sigma = time.cos(), time.sin()
        x0, eps = self.mixture.posterior(x, alpha, sigma)
        a, s = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
        return {"x0": x0, "eps": eps, "v": a * eps - s * x0}[self.p.prediction]

    def flow(self, x, time):
        s = time if self.p.time == "s" else 1 - time
        x0, eps = self.mixture.posterior(x, 1 - s, s)
        return eps - x0 if self.p.prediction == "velocity" else x0 - eps

    def trigflow(self, x, time):
        return self.mixture.F(x * self.own, time, self.own)


CONVENTIONS = [
    Parameterization("edm", "raw", "log_sigma/4"),
    Parameterization("edm", "raw", "log_sigma/4", time_scale=1000.0, teacher_sigma_data=0.8),
    Parameterization("edm", "x0", "sigma"),
    *[Parameterization("vp", prediction, time) for prediction in ("eps", "v", "x0") for time in ("log_snr", "t")],
    *[
        Parameterization("flow", prediction, time, scale)
        for prediction in ("velocity", "-velocity")
        for time, scale in (("s", 1.0), ("1-s", 1.0), ("s", 1000.0))
    ],
    Parameterization("trigflow", "F", "t"),
]


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
@pytest.mark.parametrize("p", CONVENTIONS, ids=lambda p: f"{p.family}-{p.prediction}-{p.time}-{p.time_scale:g}")
def test_map_equals_the_exact_network(mixture, p, sigma_data):
    native = Native(mixture, p, p.teacher_sigma_data or sigma_data)
    teacher = teachers.wrap(native, p, sigma_data, (2, 1, 1))
    generator = torch.Generator().manual_seed(0)
    for time in TIMES:
        t = torch.full((32,), time, dtype=torch.float64)
        z = sigma_data * torch.randn(32, 2, 1, 1, generator=generator, dtype=torch.float64)
        x_t = math.cos(time) * mixture.sample(32, generator) + math.sin(time) * z
        exact = mixture.F(x_t, t, sigma_data)
        error = (teacher(x_t, t) - exact).abs().max() / exact.abs().max()
        # 1e-9 everywhere: fp64 leaves room even where eps (near pi/2) and x0 (near 0) lose digits.
        assert error < 1e-9, f"t = {time}: {error}"


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


def test_both_odes_follow_the_same_curve(mixture):
    """The flow teacher's own ODE ``dy/ds = v`` and TrigFlow's ``dx/dt = sigma_data F`` end at the same point."""
    sd = 0.7
    p = teachers.RECTIFIED_FLOW
    native = Native(mixture, p, sd)
    teacher = teachers.wrap(native, p, sd, (2, 1, 1))
    t0, t1 = 1.2, 0.2
    full = lambda v: torch.full((16,), v, dtype=torch.float64)  # noqa: E731
    x = torch.randn(16, 2, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    end = rk4(lambda x, t: sd * teacher(x, full(t)), x, t0, t1, 400)
    s = lambda t: sd * math.sin(t) / (math.cos(t) + sd * math.sin(t))  # noqa: E731
    scale = lambda t: 1 / (math.cos(t) + sd * math.sin(t))  # noqa: E731
    native_end = rk4(lambda y, s: native(y, full(s)), x * scale(t0), s(t0), s(t1), 400)
    torch.testing.assert_close(end * scale(t1), native_end, rtol=0, atol=1e-8)


def test_edm_network_is_minus_trigflow_network(mixture):
    x, t = torch.randn(4, 2, 1, 1, dtype=torch.float64), torch.tensor([0.1, 0.5, 1.0, 1.5], dtype=torch.float64)
    c = teachers.EDM.coefficients(t, 0.5)
    u = torch.randn_like(x)
    torch.testing.assert_close(teachers.EDM.to_trigflow(u, x, t, c, 0.5), -u, rtol=1e-13, atol=1e-13)


def test_rearranged_time_tangents():
    """``cos sin dc/dt`` is 1/4 for EDM's noise embedding and ``s (1 - s)`` for rectified flow, at every t."""
    t = torch.linspace(0.004, 1.5645, 50, dtype=torch.float64)
    for p, expected in (
        (teachers.EDM, lambda c: torch.full_like(t, 0.25)),
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
        (("ddpm", "eps", "t"), "family is 'ddpm'"),
        (("edm", "eps", "sigma"), "prediction of a edm teacher is 'eps'"),
        (("flow", "velocity", "t"), "time signal of a flow teacher is 't'"),
        (("flow", "velocity", "s", 1.0, 0.5), "teacher_sigma_data"),
    ],
)
def test_impossible_conventions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Parameterization(*arguments)
