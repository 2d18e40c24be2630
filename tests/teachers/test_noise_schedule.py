"""Steps of discrete noise schedules against diffusers' own tables, and their derivative."""

import diffusers
import pytest
import torch

from teachers.noise_schedule import BetaSchedule, knots, step_at

SCHEDULES = [
    BetaSchedule("linear", 1e-4, 0.02, 1000), BetaSchedule("scaled_linear", 0.00085, 0.012, 1000),
    BetaSchedule("squaredcos_cap_v2", 1e-4, 0.02, 1000), BetaSchedule("linear", 1e-3, 0.3, 20),
]  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_steps_are_those_of_diffusers(schedule):
    theirs = diffusers.DDPMScheduler(
        beta_schedule=schedule.kind, beta_start=schedule.start, beta_end=schedule.end, num_train_timesteps=schedule.steps
    )
    signal = theirs.alphas_cumprod.double()  # a product of fp32 numbers
    steps = step_at((1 - signal).log() - signal.log(), schedule)
    assert (steps - torch.arange(schedule.steps)).abs().max() < 5e-3


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_step_is_exact_increasing_and_continuously_differentiable(schedule):
    noise, _ = knots(schedule)
    assert torch.equal(step_at(noise, schedule), torch.arange(schedule.steps, dtype=torch.float64))
    x = torch.linspace(noise[0].item() + 1e-3, noise[-1].item() - 1e-3, 20_000, dtype=torch.float64)
    _, slope = torch.func.jvp(lambda value: step_at(value, schedule), (x,), (torch.ones_like(x),))
    assert (slope > 0).all()
    h = 1e-6
    assert torch.allclose(slope, (step_at(x + h, schedule) - step_at(x - h, schedule)) / (2 * h), rtol=1e-4, atol=1e-6)
    inner = noise[1:-1]
    before, after = (
        torch.func.jvp(lambda value: step_at(value, schedule), (inner + side,), (torch.ones_like(inner),))[1]
        for side in (-1e-9, 1e-9)
    )
    assert torch.allclose(before, after, rtol=1e-5)


def test_beyond_its_ends_a_schedule_stays_where_it_is():
    schedule = SCHEDULES[0]
    far = torch.tensor([-60.0, 60.0], dtype=torch.float64)
    steps, slope = torch.func.jvp(lambda value: step_at(value, schedule), (far,), (torch.ones_like(far),))
    assert steps.tolist() == [0, 999] and slope.tolist() == [0, 0]
