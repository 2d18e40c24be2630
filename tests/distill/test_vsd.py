"""Variational score distillation against Gaussians, whose scores and distances are known."""

import dataclasses
import json
import math
import signal

import pytest
import torch
from support import ExactGaussian

import teachers
from distill import trigflow
from distill.objectives.vsd import VSD, FakeScore, generate_samples
from distill.recipe import parse_recipe
from distill.sampling import consistency_sample
from distill.schedule import student_times
from distill.trainer import Trainer

SD, SHAPE = 0.5, (1, 4, 4)
BASE = dict(
    objective="vsd", output_dir="x", sigma_data=SD, max_train_steps=1, train_batch_size=4, sample_shape=list(SHAPE),
    teacher="x", data="mnist",
)  # fmt: skip


def wrap(network):
    return teachers.wrap(network, teachers.TRIGFLOW, SD, SHAPE)


def recipe(**vsd):
    return parse_recipe({**BASE, "vsd": vsd}, "test")


def noise(seed=0):
    return torch.Generator().manual_seed(seed)


X0 = torch.zeros(64, *SHAPE, dtype=torch.float64)


def test_the_score_difference_is_that_of_the_two_densities():
    """``cos t / (sd sin t) (F_teacher - F_fake) = grad log q_t - grad log p_t`` at ``x_t``, both Gaussian."""
    p, q = 0.3, 0.4
    objective = VSD(recipe(), wrap(ExactGaussian(False, p)), wrap(ExactGaussian(False, q)))
    x, t = q * torch.randn(64, *SHAPE, dtype=torch.float64, generator=noise(3)), torch.linspace(0.1, 1.5, 64).double()
    difference, denoised = objective.score_difference(x, t, None, None, noise(4))
    t = trigflow.expand(t, x)
    x_t = t.cos() * x + t.sin() * SD * torch.randn(x.shape, generator=noise(4)).double()
    variance = lambda s: (s * t.cos()).square() + (SD * t.sin()).square()  # noqa: E731
    expected = x_t / variance(p) - x_t / variance(q)
    torch.testing.assert_close(t.cos() / (SD * t.sin()) * difference, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(denoised, p**2 * t.cos() / variance(p) * x_t, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weighting", ["adaptive", "dmd"])
@pytest.mark.parametrize("s", [0.2, 0.3, 0.45])
def test_the_gradient_vanishes_where_the_densities_agree_and_points_there_elsewhere(weighting, s):
    generator = ExactGaussian(True, s)
    objective = VSD(recipe(weighting=weighting), wrap(ExactGaussian(False, 0.3)), wrap(ExactGaussian(False, s)))
    student = wrap(generator)
    objective(student, student, X0, None, 0, noise()).loss.backward()
    if s == 0.3:
        assert abs(generator.s.grad) < 1e-9
    else:
        assert math.copysign(1, generator.s.grad) == math.copysign(1, s - 0.3)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_two_networks_find_the_teachers_distribution(steps):
    """Both trained in turn, from wrong starts, as the trainer does; they then circle around it."""
    parsed = recipe(weighting="dmd", steps=steps, p_std=1.0, fake_p_std=1.0, p_mean=-1.0)
    student, fake = wrap(ExactGaussian(True, 0.5)), wrap(ExactGaussian(False, 0.5))
    objective, fake_objective = VSD(parsed, wrap(ExactGaussian(False, 0.3)), fake), FakeScore(parsed)
    student_step, fake_step = (torch.optim.Adam(n.parameters(), lr=0.01, betas=(0.5, 0.9)) for n in (student, fake))
    spreads = []
    for step in range(300):
        for optimizer, loss in (
            (fake_step, lambda n: fake_objective(fake, student, X0, None, n)),
            (student_step, lambda n: objective(student, student, X0, None, step, n).loss),  # noqa: B023
        ):
            optimizer.zero_grad()
            loss(noise(step)).backward()
            optimizer.step()
        spreads.append([student.native.s.item(), fake.native.s.item()])
    assert torch.tensor(spreads[-100:]).mean(0).tolist() == pytest.approx([0.3, 0.3], abs=0.02)


def test_samples_are_those_of_the_multistep_sampler_and_only_the_last_step_is_differentiated():
    student, parsed = wrap(ExactGaussian(True, 0.3)), recipe(steps=3)
    times, seen = student_times(3, SD), set()
    for seed in range(12):
        calls = []
        generator = noise(seed)
        counted = lambda *a: calls.append(a[1][0].item()) or student(*a)  # noqa: E731, B023
        x = generate_samples(counted, student, parsed, X0.shape, None, None, generator, X0.device)
        again = noise(seed)
        torch.randint(1, (1,), generator=again)  # of the numbers of steps
        last = int(torch.randint(3, (1,), generator=again))
        seen.add(last)
        draw = lambda: SD * torch.randn(X0.shape, generator=again)  # noqa: E731, B023
        z = draw()
        if last > 0:
            z = trigflow.perturb(consistency_sample(student, draw, times[:last], SD), z, torch.full((64,), times[last]))
        t = torch.full((64,), times[last])
        expected = trigflow.consistency_function(z, student(z, t).to(z.dtype), t, SD)
        torch.testing.assert_close(x, expected)
        assert calls == pytest.approx([times[last]]) and x.requires_grad
    assert seen == {0, 1, 2}


def test_of_several_numbers_of_steps_each_has_its_own_times():
    student, parsed, seen = wrap(ExactGaussian(True, 0.3)), recipe(steps=[1, 2, 4]), []
    record = lambda x, t, *condition: seen.append(t[0].item()) or student(x, t, *condition)  # noqa: E731
    for seed in range(120):
        generate_samples(record, student, parsed, X0[:1].shape, None, None, noise(seed), X0.device)
    first, *later = student_times(4, SD)
    assert {round(t, 4) for t in seen} == {round(t, 4) for t in (first, *later, *student_times(2, SD))}
    share = sum(t == pytest.approx(first) for t in seen) / len(seen)
    assert share == pytest.approx((1 + 1 / 2 + 1 / 4) / 3, abs=0.12)


def test_simulated_samples_have_the_times_of_the_recipe():
    student, seen = wrap(ExactGaussian(True, 0.3)), set()
    parsed = dataclasses.replace(recipe(steps=3), intermediate_times={3: [1.0, 0.5]})
    record = lambda x, t, *condition: seen.add(round(t[0].item(), 4)) or student(x, t, *condition)  # noqa: E731
    for seed in range(12):
        generate_samples(record, student, parsed, X0[:1].shape, None, None, noise(seed), X0.device)
    assert seen == {round(student_times(1, SD)[0], 4), 1.0, 0.5}


def test_the_fake_score_follows_the_samples():
    """Its loss is least for the network of the samples' own distribution."""
    student, objective = wrap(ExactGaussian(True, 0.3)), FakeScore(recipe(weighting="dmd"))
    x0 = torch.zeros(4096, *SHAPE)
    losses = {s: objective(wrap(ExactGaussian(False, s)), student, x0, None, noise()).item() for s in (0.25, 0.3, 0.36)}
    assert min(losses, key=losses.get) == 0.3


# ---- in the trainer --------------------------------------------------------------------------------------------------


@pytest.fixture
def values(make_teacher, tmp_path):
    teachers.save_pretrained(make_teacher("SiT", depth=1), tmp_path / "teacher", "teacher")
    return dict(
        objective="vsd", teacher=str(tmp_path / "teacher"), output_dir=str(tmp_path / "run"), sigma_data=0.5,
        sample_shape=[1, 8, 8], num_classes=3, data={"source": "teacher", "num_teacher_samples": 32, "teacher_steps": 2},
        max_train_steps=4, train_batch_size=8, checkpointing_steps=2, logging_steps=1, validation_steps=4,
        optimizer={"learning_rate": 1e-3}, ema=[{"half_life_images": 50}], evaluation={"validation_samples": 0}, vsd={},
    )  # fmt: skip


def weights(trainer):
    return {
        f"{name}.{key}": tensor.clone()
        for name, module in trainer.modules().items() for key, tensor in module.state_dict().items()
    }  # fmt: skip


def run(values, **changes):
    trainer = Trainer(parse_recipe({**values, **changes}, "test"))
    trainer.train()
    return trainer


SUM = {"objective": "distillation", "vsd": {"weight": 0.5, "fake_updates": 2}, "tangent": {"warmup_steps": 0}}
MULTISTEP = {"vsd": {"steps": 2, "weighting": "dmd"}, "gradient_accumulation_steps": 2}
RANGE = {"guidance_scale": [1.0, 3.0]}
LATE = {**SUM, "vsd": {**SUM["vsd"], "share": 0.25}}  # interrupted just before VSD begins


@pytest.mark.parametrize(
    "changes", [{}, SUM, MULTISTEP, RANGE, LATE], ids=["vsd", "sCD + vsd", "multistep", "guidance range", "late"]
)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(values, tmp_path, changes):
    whole = run(values, **changes, output_dir=str(tmp_path / "whole"))
    parts = parse_recipe({**values, **changes, "output_dir": str(tmp_path / "parts")}, "test")
    first = Trainer(parts)
    start, original = weights(first), first.train_step

    def step_then_stop(*args):
        original(*args)
        first.stop_signal = signal.SIGTERM if first.step == 3 else None

    first.train_step = step_then_stop
    with pytest.raises(SystemExit):
        first.train()
    parts.resume_from_checkpoint = "latest"
    second = Trainer(parts)
    second.train()
    expected, found = weights(whole), weights(second)
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    for prefix in ("network.", "fake."):  # both were trained
        assert any(not torch.equal(start[key], expected[key]) for key in start if key.startswith(prefix))
    lines = [json.loads(line) for line in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line and line["step"] > 4 * (1 - whole.recipe.vsd.share)]
    assert logged and all({"score_difference", "fake_loss"} <= line.keys() for line in logged)


def test_the_sum_has_the_gradients_of_both(values):
    """One backward pass after the other leaves the sum of the two gradients."""

    changes = {"objective": "distillation", "vsd": {"weight": 0.25}, "tangent": {"warmup_steps": 0}}
    trainer = Trainer(parse_recipe({**values, **changes}, "test"))
    x0, labels = torch.randn(4, 1, 8, 8, generator=noise(5)), torch.tensor([0, 1, 2, 0])
    trainer.backward(0, x0, labels)
    both = [p.grad.clone() for p in trainer.network.parameters() if p.grad is not None]
    (consistency, _), (vsd, weight) = trainer.objectives
    assert weight == 0.25
    generator = trainer.seeded(0)
    trainer.network.zero_grad()
    total = consistency(trainer.prepared, trainer.network, x0, labels, 0, generator).loss
    total = total + 0.25 * vsd(trainer.prepared, trainer.network, x0, labels, 0, generator).loss
    total.backward()
    expected = [p.grad for p in trainer.network.parameters() if p.grad is not None]
    torch.testing.assert_close(both, expected, rtol=1e-4, atol=1e-6)


def test_the_teacher_is_guided_and_the_fake_score_is_not(values):
    trainer = Trainer(parse_recipe({**values, "guidance_scale": 2.0}, "test"))
    objective = trainer.objectives[0][0]
    assert objective.teacher.guidance_scale == 2.0 and objective.fake.guidance_scale == 1.0
    ranged = Trainer(parse_recipe({**values, **RANGE}, "test"))
    assert ranged.fake.network.accepts_guidance and ranged.network.accepts_guidance


def test_before_vsd_begins_a_run_is_one_without(values, tmp_path):
    late = run({**values, **LATE, "output_dir": str(tmp_path / "late")})
    assert {float(state["step"]) for state in late.fake.optimizer.state.values()} == {2.0}  # of one step
    run({**values, **LATE, "vsd": None, "output_dir": str(tmp_path / "plain")})
    for name in ("network.safetensors", "weighting.safetensors", "ema-0.safetensors"):
        first, second = ((tmp_path / folder / "checkpoint-2" / name).read_bytes() for folder in ("late", "plain"))
        assert first == second


def test_the_log_has_the_means_of_the_steps_that_have_vsd(values, tmp_path):
    changes = {**LATE, "vsd": {**SUM["vsd"], "share": 0.5}}

    def logged(logging_steps):
        folder = tmp_path / str(logging_steps)
        run({**values, **changes, "output_dir": str(folder), "logging_steps": logging_steps})
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [line["fake_loss"] for line in lines if "fake_loss" in line]

    each, whole = logged(1), logged(4)
    assert len(each) == 2 and whole == [pytest.approx(sum(each) / 2)]


def test_updates_of_the_fake_score(values):
    trainer = run(values, vsd={"fake_updates": 3, "fake_learning_rate": 2e-3}, max_train_steps=2)
    steps = {float(state["step"]) for state in trainer.fake.optimizer.state.values()}
    assert steps == {6.0}
    assert trainer.fake.optimizer.param_groups[0]["lr"] == 2 * trainer.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vsd": None}, "objective vsd needs the section vsd"),
        ({"objective": "training"}, "vsd belongs to objectives vsd and distillation"),
        ({"vsd": {"weighting": "none"}}, "vsd.weighting is 'none'; allowed: adaptive, dmd"),
        ({"vsd": {"steps": 9}}, "vsd.steps must be 1 to 8, or a list of such numbers, got 9"),
        ({"vsd": {"steps": []}}, "or a list of such numbers, got \\[\\]"),
        ({"vsd": {"steps": [1, 9]}}, "or a list of such numbers, got \\[1, 9\\]"),
        ({"vsd": {"fake_updates": 0}}, "vsd.fake_updates must be at least 1"),
        ({"vsd": {"weight": 0.0}}, "vsd.weight must be positive"),
        ({"vsd": {"weight": 0.5}}, "vsd.weight is against sCD's loss"),
        ({"vsd": {"share": 0.5}}, "vsd.share belongs to objective distillation"),
        ({"objective": "distillation", "vsd": {"share": 0.0}}, "vsd.share must be above 0 and at most 1, got 0.0"),
        ({"objective": "distillation", "vsd": {"share": 1.5}}, "vsd.share must be above 0 and at most 1, got 1.5"),
        ({"target_half_life_images": 10.0}, "belongs to the consistency objectives"),
    ],
)
def test_a_recipe_that_makes_no_sense(values, changes, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe({**values, **changes}, "test")
