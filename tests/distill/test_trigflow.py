import math

import torch

from distill import trigflow

SD = 0.5
X0, Z = torch.randn(2, 5, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T = torch.tensor([0.01, 0.4, 0.9, 1.3, 1.56], dtype=torch.float64)


def test_velocity_is_the_derivative_of_the_process():
    h = 1e-6
    slope = (trigflow.perturb(X0, Z, T + h) - trigflow.perturb(X0, Z, T - h)) / (2 * h)
    torch.testing.assert_close(trigflow.velocity(X0, Z, T), slope, rtol=1e-8, atol=1e-9)


def test_ddim_step_is_exact_when_the_data_is_one_point():
    """For a point mass at x0 the exact F is the conditional velocity, and every step lands on the same curve."""
    x_s = trigflow.perturb(X0, Z, T)
    F = trigflow.velocity(X0, Z, T) / SD
    t = T / 3
    torch.testing.assert_close(trigflow.ddim_step(x_s, F, T, t, SD), trigflow.perturb(X0, Z, t))
    torch.testing.assert_close(trigflow.consistency_function(x_s, F, T, SD), X0)
    torch.testing.assert_close(trigflow.network_output(x_s, X0, T, SD), F)


def test_fp64_loses_nothing_at_the_ends():
    t = torch.atan(torch.tensor([0.002, 80.0, 80.0, 0.002, 1.0], dtype=torch.float64) / SD)
    x_t = trigflow.perturb(X0, Z, t)
    F = trigflow.network_output(x_t, X0, t, SD)
    torch.testing.assert_close(trigflow.consistency_function(x_t, F, t, SD), X0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(F * SD, trigflow.velocity(X0, Z, t), rtol=1e-9, atol=1e-9)


def test_time_maps_invert_each_other():
    sigma = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    t = trigflow.time_from_sigma(sigma, SD)
    torch.testing.assert_close(trigflow.sigma_from_time(t, SD), sigma)
    s = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    t = trigflow.time_from_flow(s, SD)
    torch.testing.assert_close(SD * t.sin() / (t.cos() + SD * t.sin()), s)
    assert trigflow.max_time(SD) == math.atan(160)


def test_proposal_is_log_normal_in_sigma():
    t = trigflow.sample_times(200_000, -1.0, 1.4, SD, torch.Generator().manual_seed(0))
    tau = trigflow.sigma_from_time(t, SD).log()
    assert t.dtype == torch.float64 and t.min() > 0 and t.max() < math.pi / 2
    assert abs(tau.mean() + 1.0) < 0.02 and abs(tau.std() - 1.4) < 0.02
