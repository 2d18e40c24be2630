"""The trainer through its public face: exact resume, signals, bad numbers, full disks."""

import json
import math
import re
import resource
import signal
import sys
import time
import warnings
from contextlib import contextmanager

import pytest
import torch
import yaml
from datasets import Dataset, Features, Image, Value
from safetensors.torch import load_file
from support import UNET2D
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

import distill
import teachers
from distill import checkpoint as ckpt
from distill.data import teacher_samples, training_data, training_loader
from distill.ema import EMA, power_exponent, update_averages
from distill.endpoint import EndpointError, rising_at_small_t
from distill.log import Window
from distill.optimizer import build_optimizer, learning_rate
from distill.recipe import OptimizerConfig, parse_recipe
from distill.recipe_networks import build_teacher, set_dropout
from distill.run import check, main
from distill.trainer import Trainer, TrainingError, save_model, trained_model

# The smallest network with dropout.
SMALL_UNET = {"channel_mult": [1], "attn_resolutions": []}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """64 images of three classes; ``datasets`` prepares a file once."""
    generator = torch.Generator().manual_seed(0)
    pixels = (torch.randn(64, 8, 8, generator=generator) * 68 + 127).clamp(0, 255).byte().numpy()
    features = Features({"image": Image(), "label": Value("int64")})
    rows = Dataset.from_dict({"image": list(pixels), "label": [i % 3 for i in range(64)]}, features=features)
    path = tmp_path_factory.mktemp("data") / "train.parquet"
    rows.to_parquet(path)
    return str(path)


@pytest.fixture
def world(make_teacher, tmp_path, data):
    """A teacher on disk, and a recipe as plain values. A transformer: the U-Nets take seven times as long."""
    teachers.save_pretrained(make_teacher("SiT", depth=1), tmp_path / "teacher", "teacher")
    teachers.save_pretrained(make_teacher("SiT", depth=1, hidden_size=16), tmp_path / "weaker", "teacher")
    values = dict(
        objective="distillation", teacher=str(tmp_path / "teacher"), output_dir=str(tmp_path / "run"), sigma_data=0.5,
        sample_shape=[1, 8, 8], num_classes=3, data={"source": data}, max_train_steps=6,
        train_batch_size=8, checkpointing_steps=2, logging_steps=1, validation_steps=100,
        tangent={"warmup_steps": 4}, optimizer={"learning_rate": 1e-3}, gradient_accumulation_steps=2,
        ema=[{"half_life_images": 50}, {"sigma_rel": 0.1}], evaluation={"validation_samples": 0},
    )  # fmt: skip
    return tmp_path, values


def run(values, **changes):
    trainer = Trainer(parse_recipe({**values, **changes}, "test"))
    trainer.train()
    return trainer


def weights(trainer):
    return [v.clone() for name in sorted(trainer.modules()) for v in trainer.modules()[name].state_dict().values()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def test_a_compiled_run_is_the_same_run(world):
    """In particular the derivative, which is easily lost: of a compiled network PyTorch differentiates the original, and a
    tangent that a network makes itself may be dropped in compiled code.
    """
    _, values = world
    values |= {"max_train_steps": 3, "checkpointing_steps": 10, "gradient_accumulation_steps": 1}
    values |= {"tangent": {"warmup_steps": 0}}
    plain = run(values)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = run(values, compile="aot_eager", output_dir=values["output_dir"] + "-compiled")
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= 3 and not counters["graph_break"]  # teacher, derivative, the loss' forward
    before = torch.cat([p.flatten() for p in plain.teacher.parameters()])
    moved, expected = (torch.cat([p.detach().flatten() for p in t.network.parameters()]) - before for t in (compiled, plain))
    assert (moved - expected).norm() / expected.norm() < 1e-4


SEGMENTS = {"segments": {"everywhere_share": 0.4, "below": 0.5, "tangent_share": 0.2}, "target_half_life_images": 30.0}


GUIDED = {"guidance_scale": [1.0, 3.0], "guidance_teacher": "weaker"}
DROPOUT = {"objective": "diffusion", "teacher": "unet", "dropout": 0.1}


@pytest.mark.parametrize(
    "changes",
    [{}, {"objective": "training"}, {"discrete_steps": 16}, SEGMENTS, GUIDED, DROPOUT],
    ids=["sCD", "sCT", "discrete", "segments", "guided", "dropout"],
)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(world, changes, make_teacher):
    folder, values = world
    teachers.save_pretrained(make_teacher("SongUNet", **SMALL_UNET), folder / "unet", "teacher")
    values |= {key: str(folder / value) if key.endswith("teacher") else value for key, value in changes.items()}
    whole = run(values, output_dir=str(folder / "whole"))
    parts = parse_recipe({**values, "output_dir": str(folder / "parts")}, "test")
    first = Trainer(parts)
    original = first.train_step

    def step_then_stop(*args):
        original(*args)
        first.stop_signal = signal.SIGTERM if first.step == 3 else None

    first.train_step = step_then_stop
    with pytest.raises(SystemExit) as stop:
        first.train()
    assert stop.value.code == 0 and not equal(first, whole)
    parts.resume_from_checkpoint = "latest"
    second = Trainer(parts)
    second.train()
    assert equal(second, whole)
    lines = [json.loads(line) for line in (folder / "parts/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_weights_are_arranged_for_the_cpu_while_they_are_trained(world, make_teacher, monkeypatch):
    """A fused optimizer pairs gradients and moments with weights by their places in memory, so a run that goes on from a
    checkpoint of another arrangement would show it if these were mixed up.
    """
    folder, values = world
    teacher = make_teacher("SongUNet", **SMALL_UNET)
    teachers.save_pretrained(teacher, folder / "unet", "teacher")
    values |= {"teacher": str(folder / "unet"), "checkpointing_steps": 3, "optimizer": {"name": "adam"}}
    convolution = "enc.8x8_block0.conv0.weight"

    def trained(name, **changes):
        trainer = Trainer(parse_recipe({**values, "output_dir": str(folder / name), **changes}, "test"), teacher)
        trainer.train()
        return trainer

    arranged = trained("arranged")
    assert not arranged.network.native.get_parameter(convolution).is_contiguous()
    assert all(p.is_contiguous() for p in teacher.parameters()), "the user's own"
    assert all(p.is_contiguous() for p in trained_model(arranged).network.parameters())
    with monkeypatch.context() as patch:
        patch.setattr("distill.parallel.fast_weights", lambda network: network)
        plain = trained("plain")
    assert plain.network.native.get_parameter(convolution).is_contiguous()
    resumed = trained("resumed", resume_from_checkpoint=str(folder / "plain/checkpoint-3"))
    assert not resumed.network.native.get_parameter(convolution).is_contiguous()
    start = torch.cat([p.flatten() for p in teacher.parameters()])
    moved = [torch.cat([p.detach().flatten() for p in t.network.parameters()]) - start for t in (plain, arranged, resumed)]
    for each in moved[1:]:
        assert (each - moved[0]).norm() < 1e-3 * moved[0].norm()


def test_where_segments_are_over_the_run_is_one_without(world):
    _, values = world
    plain = run(values)
    over = {"segments": {"tangent_share": 1.0}, "target_half_life_images": 30.0}
    assert equal_modules(run(values, **over, output_dir=values["output_dir"] + "-over").network, plain.network)


def test_what_a_run_leaves_behind(world):
    folder, values = world
    trainer = run(values, validation_steps=3)
    names = sorted(p.name for p in (folder / "run").iterdir())
    assert names == ["checkpoint-4", "checkpoint-6", "curves.png", "metrics.jsonl", "recipe.yaml", "samples"]
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    logged = next(line for line in lines if "loss" in line)
    assert {"loss", "tangent_norm", "grad_norm", "lr", "images_per_second", "nonfinite_steps"} <= logged.keys()
    assert [line["step"] for line in lines if "endpoint_error/0.3" in line] == [0, 3, 6]
    assert not equal_modules(trainer.network, trainer.student)


def equal_modules(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def break_steps(trainer, broken):
    """Make the losses of these steps, counted from 1, not finite."""
    objective = trainer.objectives[0][0]
    original = objective.__class__.__call__

    def call(self, student, network, x0, labels, step, generator):
        result = original(self, student, network, x0, labels, step, generator)
        return result._replace(loss=result.loss * float("nan")) if step + 1 in broken else result

    objective.__class__ = type("Broken", (objective.__class__,), {"__call__": call})


def test_nonfinite_steps_are_skipped_counted_and_fatal_past_a_limit(world, capsys):
    _, values = world
    trainer = Trainer(parse_recipe({**values, "max_nonfinite_steps": 3}, "test"))
    before = weights(trainer)
    break_steps(trainer, range(100))
    with pytest.raises(TrainingError, match="3 steps in a row were not finite at step 3; the last good checkpoint: none"):
        trainer.train()
    assert trainer.nonfinite["total"] == 3
    assert "step 3: loss or gradient is not finite; skipped" in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(weights(trainer), before, strict=True))


@pytest.mark.parametrize("optimizer", ["radam", "adam"])
def test_a_run_with_a_nonfinite_step_goes_on_and_resumes_exactly(world, optimizer):
    folder, values = world
    values |= {"optimizer": {"name": optimizer, "learning_rate": 1e-3}, "max_nonfinite_steps": 2, "logging_steps": 3}
    values |= {"checkpointing_steps": 1, "checkpoints_total_limit": 9}
    whole = Trainer(parse_recipe(values, "test"))
    break_steps(whole, [2, 5])
    network, seen, original = whole.network, {}, whole.train_step

    def train_step(*args):
        original(*args)
        seen[whole.step] = [p.clone() for p in network.parameters()]

    whole.train_step = train_step
    whole.train()
    unchanged = [step for step in range(2, 7) if all(map(torch.equal, seen[step], seen[step - 1]))]
    assert unchanged == [2, 5] and whole.nonfinite == {"total": 2, "in_a_row": 0}
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    assert [line["nonfinite_steps"] for line in lines] == [1, 2] and all(math.isfinite(x) for x in lines[1].values())
    assert [path.name for path in ckpt.checkpoints(folder / "run")] == [f"checkpoint-{step}" for step in (1, 3, 4, 6)]
    again = Trainer(parse_recipe({**values, "resume_from_checkpoint": str(folder / "run/checkpoint-4")}, "test"))
    break_steps(again, [5])
    again.train()
    assert equal(again, whole) and again.nonfinite == whole.nonfinite


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a device: reading a number, and shapes that depend on values."""

    KINDS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in self.KINDS
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"objective": "training"}, {"objective": "diffusion"}, {"mixed_precision": "bf16"},
        {"vsd": {"steps": [1, 2, 4]}}, {"segments": {"below": 1.0}, "target_half_life_images": 30.0},
    ],
)  # fmt: skip
def test_a_step_does_not_wait_for_the_device(world, changes):
    _, values = world
    changes = {**changes, "tangent": {}} if changes.get("objective") == "diffusion" else changes
    trainer = Trainer(parse_recipe({**values, **changes, "optimizer": {"max_grad_norm": 1.0}}, "test"))
    data = training_data(trainer.recipe, trainer.teacher, trainer.output_dir / "cache")
    batches, window = iter(training_loader(data, trainer.sampler(len(data)), 0)), Window()
    trainer.train_step(batches, window)
    with Waits() as waits:
        trainer.train_step(batches, window)
    assert waits.count == 0
    with Waits() as waits:
        bool(torch.ones(()).isfinite())
    assert waits.count == 1


def test_an_absurd_learning_rate_ends_with_the_last_good_checkpoint(world, capsys):
    folder, values = world
    values |= {"objective": "training", "teacher": str(folder / "weaker"), "tangent": {"warmup_steps": 0}, "dropout": 0.0}
    values |= {"validation_steps": 100, "logging_steps": 2}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**values, "max_train_steps": 100, "optimizer": {"learning_rate": 0.3, "name": "adam"}}))
    run(values, max_train_steps=2, optimizer={"learning_rate": 1e-3, "name": "adam"})
    good = load_file(folder / "run/checkpoint-2/network.safetensors")
    assert main([str(path), "resume_from_checkpoint=latest", "evaluation.validation_samples=0"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match("error: training has diverged: .* the last good checkpoint: .*run/checkpoint-2; ", error)
    assert [p.name for p in ckpt.checkpoints(folder / "run")] == ["checkpoint-2"]
    assert all(torch.isfinite(tensor).all() and tensor.abs().max() < 100 for tensor in good.values())
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    assert lines[-1]["step"] > 2 and all(
        lines[-1][f"largest_{key}"] > 10 * lines[0][f"largest_{key}"] for key in ("tangent_norm", "grad_norm")
    )  # fmt: skip
    assert (folder / "run/curves.png").stat().st_mtime_ns >= (folder / "run/metrics.jsonl").stat().st_mtime_ns
    start = str(folder / "run/checkpoint-2")
    elsewhere = [f"output_dir={folder}/elsewhere", f"resume_from_checkpoint={start}", "evaluation.validation_samples=0"]
    assert main([str(path), *elsewhere]) == 1
    assert f"the last good checkpoint: {start}; " in capsys.readouterr().err


@contextmanager
def file_size_limit(size):
    """As on a full disk, no file can grow beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [1000, 200_000])  # too small for the weights; too small for the optimizer
def test_a_failed_save_keeps_the_earlier_checkpoint(world, size):
    folder, values = world
    trainer = run(values, max_train_steps=2)
    before = (folder / "run/checkpoint-2/optimizer.pt").stat().st_size
    assert before > size
    trainer.step = 4
    with file_size_limit(size), pytest.raises(OSError, match="too large.*earlier checkpoints are intact"):
        trainer.save()
    assert [p.name for p in ckpt.checkpoints(folder / "run")] == ["checkpoint-2"]
    assert not list((folder / "run").glob(".checkpoint*"))


def test_an_earlier_run_in_the_folder_is_moved_aside(world):
    folder, values = world
    run(values, max_train_steps=4)
    run(values, max_train_steps=2)
    assert [p.name for p in ckpt.checkpoints(folder / "run")] == ["checkpoint-2"]
    moved = {p.name for p in (folder / "run/earlier-1").iterdir()}
    assert moved == {"checkpoint-2", "checkpoint-4", "curves.png", "metrics.jsonl", "recipe.yaml", "samples"}
    run(values, max_train_steps=4, resume_from_checkpoint="latest")
    assert [p.name for p in ckpt.checkpoints(folder / "run")] == ["checkpoint-2", "checkpoint-4"]
    run(values, max_train_steps=4, resume_from_checkpoint=str(folder / "run/checkpoint-2"))
    assert [p.name for p in (folder / "run/earlier-2").iterdir()] == ["checkpoint-4"]


def test_a_log_line_that_was_cut_off_is_dropped_on_resume(world):
    folder, values = world
    run(values, max_train_steps=2)
    with (folder / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    run(values, max_train_steps=4, resume_from_checkpoint="latest")
    steps = [json.loads(line)["step"] for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 2, 3, 4, 4]


def test_a_damaged_checkpoint_is_one_sentence(world):
    folder, values = world
    run(values, max_train_steps=2)
    file = folder / "run/checkpoint-2/network.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match="checkpoint .*checkpoint-2 is damaged: network.safetensors is not the file that"):
        run(values, resume_from_checkpoint=str(folder / "run/checkpoint-2"))
    with pytest.raises(FileNotFoundError, match="is not a checkpoint; in this run: .*checkpoint-2"):
        run(values, resume_from_checkpoint=str(folder / "nothing"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sigma_data": 0.8, "teacher": "unet"}, "has sigma_data 0.5, the recipe says 0.8"),
        ({"sample_shape": [1, 28, 28]}, "has sample_shape"),
        ({"data": "mnist"}, "have shape .1, 28, 28., the recipe wants .1, 8, 8."),
        ({"data": {"source": "/nowhere.parquet"}}, "does not exist"),
        ({"train_batch_size": 65}, "64 images are fewer than one batch of 65"),
        ({"data": {"source": "TRAIN", "label_column": None}}, "is read without labels .* the recipe has 3 classes"),
        ({"data": {"source": "TRAIN", "image_column": "label"}}, "column 'label' .* holds no images"),
        ({"sample_shape": [2, 8, 8]}, "has sample_shape"),
    ],
)
def test_what_does_not_fit_together_is_refused(world, change, message, make_teacher):
    folder, values = world
    if "teacher" in change:
        teachers.save_pretrained(make_teacher("SongUNet", **SMALL_UNET), folder / "unet", "teacher")
        change["teacher"] = str(folder / "unet")
    if "source" in change.get("data", ()):
        change["data"]["source"] = change["data"]["source"].replace("TRAIN", values["data"]["source"])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(values, **change)


def test_labels_of_the_data_must_be_classes(world, make_teacher):
    folder, values = world
    two = make_teacher("SiT", depth=1, num_classes=2, classes=2)
    teachers.save_pretrained(two, folder / "two", "teacher")
    with pytest.raises(ValueError, match="label 2 in .*train.parquet' is out of range for num_classes 2"):
        run(values, teacher=str(folder / "two"), num_classes=2)


def test_a_tracker_that_is_not_installed_is_refused(world, monkeypatch):
    _, values = world
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as find_spec sees a package that is not there
    with pytest.raises(ValueError, match="report_to: tensorboard needs a package: pip install tensorboard"):
        run(values, report_to="tensorboard")


def test_tensorboard_gets_what_the_log_has(world):
    folder, values = world
    run(values, report_to="tensorboard")
    events = EventAccumulator(str(folder / "run" / "scm-distill")).Reload()
    logged = [row for row in map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(r["step"], pytest.approx(r["loss"])) for r in logged]
    assert "endpoint_error/1.1" in events.Tags()["scalars"]


def test_wandb_writes_offline_into_the_run_folder(world, monkeypatch):
    folder, values = world
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(values, report_to="wandb")
    (file,) = folder.rglob("run-*.wandb")
    assert (folder / "run" / "wandb") in file.parents
    for _ in range(600):  # another process writes it, a little later
        if b"tangent_norm" in file.read_bytes():
            return
        time.sleep(0.1)
    raise AssertionError(f"{file} has no tangent norm")


def test_sigma_data_is_measured(world, make_teacher):
    folder, values = world
    teachers.save_pretrained(make_teacher("SiT", depth=1, sigma_data=0.6), folder / "wide", "teacher")
    with pytest.raises(ValueError, match="sigma_data is 0.6 in the recipe but 0.4.* measured"):
        run(values, teacher=str(folder / "wide"), sigma_data=0.6)


def test_data_from_the_teacher_is_drawn_once(world):
    folder, values = world
    data = {"source": "teacher", "num_teacher_samples": 32, "teacher_steps": 3}
    a = run(values, data=data)
    cached = list((folder / "run/cache").iterdir())
    assert len(cached) == 1
    changed = cached[0].stat().st_mtime_ns
    b = run(values, data=data)
    assert cached[0].stat().st_mtime_ns == changed and equal(a, b)


def test_a_teacher_in_memory_is_trained_without_a_file(world, make_teacher):
    folder, values = world
    teacher = make_teacher("SiT", depth=1).requires_grad_(False)
    trainer = Trainer(parse_recipe({**values, "teacher": "in memory", "max_train_steps": 2}, "test"), teacher)
    trainer.train()
    trainer.earlier_seconds = 90.0  # of a run that this one goes on from
    save_model(trained_model(trainer), folder / "student")
    config = teachers.load_config(folder / "student")
    assert config["teacher"] == "in memory" and 1.5 <= config["training"]["minutes"] < 30
    assert not equal_modules(teachers.load(folder / "student"), teacher)


class Foreign(torch.nn.Module):
    """A network of the user's own, with a time input and no labels."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Conv2d(1, 8, 3, padding=1)
        self.time = torch.nn.Linear(1, 8)
        self.out = torch.nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x, time):
        return self.out(torch.nn.functional.silu(self.inner(x) + self.time(time[:, None])[:, :, None, None]))


def test_a_foreign_network_is_distilled_in_memory(world, capsys):
    folder, values = world
    torch.manual_seed(0)
    model = distill.from_pretrained(teachers.wrap(Foreign(), teachers.EDM, 0.5, (1, 8, 8)))
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**values, "num_classes": None, "dropout": 0.0, "max_train_steps": 2}))
    before = model.network.native.inner.weight.clone()
    model.train(path, evaluation__features="pixels", evaluation__num_samples=50, evaluation__teacher_steps=0)
    assert model.role == "student" and model.sample(3, 2).shape == (3, 1, 8, 8)
    assert not torch.equal(before, model.network.native.inner.weight)
    run = folder / "run"
    assert load_file(run / "student/model.safetensors").keys() == Foreign().state_dict().keys()
    assert not (run / "pipeline").exists() and not (run / "student/config.json").exists()
    assert "warning: no pipeline will be written: Foreign is not registered and cannot be" in capsys.readouterr().out
    with pytest.raises(ValueError, match="Foreign is not registered and cannot be saved as a model folder or exported"):
        model.export(folder / "pipeline")


class Known(Foreign):
    """Registered in a test; its constructor's argument only makes it a network to be built again."""

    def __init__(self, slope=1.0):
        super().__init__()
        self.slope = slope

    def forward(self, x, time):
        return super().forward(x, time) + self.slope * x


def test_a_registered_network_is_distilled_saved_resumed_and_exported(world, registry, capsys):
    folder, values = world
    teachers.register(Known)
    torch.manual_seed(0)
    teachers.save_pretrained(teachers.wrap(Known(slope=0.5), teachers.EDM, 0.5, (1, 8, 8)), folder / "known", "teacher")
    own = {"teacher": str(folder / "known"), "num_classes": None, "dropout": 0.0}
    small = {"features": "pixels", "num_samples": 50, "teacher_steps": 0, "validation_samples": 0}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**values, **own, "evaluation": small}))
    model = distill.from_pretrained(folder / "known").train(path, max_train_steps=2)
    assert "no pipeline" not in capsys.readouterr().out and model.network.native.config == {"slope": 0.5}
    images = model.sample(3, 2)
    for place in ("run", "run/pipeline"):
        assert torch.equal(distill.from_pretrained(folder / place).sample(3, 2), images)
    again = run({**values, **own}, max_train_steps=4, resume_from_checkpoint="latest")
    assert again.step == 4 and "resumed from" in capsys.readouterr().out


class Rounded(torch.autograd.Function):
    """Without a forward-mode derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Opaque(Foreign):
    def forward(self, x, time):
        return super().forward(Rounded.apply(x), time)


def test_a_network_that_forward_mode_cannot_pass_is_refused_before_training(world):
    folder, values = world
    teacher = teachers.wrap(Opaque(), teachers.EDM, 0.5, (1, 8, 8))
    changes = {"teacher": "in memory", "num_classes": None, "dropout": 0.0}
    with pytest.raises(ValueError, match="dropout is 0.1, but Opaque has none"):
        Trainer(parse_recipe({**values, **changes, "dropout": 0.1}, "test"), teacher)
    with pytest.raises(ValueError, match=r"forward-mode AD cannot pass module 'native' \(Opaque\)"):
        Trainer(parse_recipe({**values, **changes}, "test"), teacher)
    assert not (folder / "run").exists()
    Trainer(parse_recipe({**values, **changes, "discrete_steps": 8}, "test"), teacher)  # needs no derivative


def test_training_in_bf16_keeps_weights_in_fp32(world):
    _, values = world
    trainer = run(values, mixed_precision="bf16", max_train_steps=2)
    exact = run(values, mixed_precision="no", max_train_steps=2)
    for a, b in zip(weights(trainer), weights(exact), strict=True):
        assert a.dtype == torch.float32 and torch.isfinite(a).all() and (a - b).abs().max() < 5e-3
    assert not equal(trainer, exact)


def test_gradients_are_clipped(world):
    values = {**world[1], "adaptive_weighting": False, "tangent": {"warmup_steps": 0}}
    before = weights(Trainer(parse_recipe(values, "test")))

    def movement(limit):  # RAdam's first steps are proportional to the gradient
        optimizer = {"learning_rate": 1e-3, "max_grad_norm": limit}
        after = weights(run(values, optimizer=optimizer, max_train_steps=1))
        return max((a - b).abs().max().item() for a, b in zip(after, before, strict=True))

    assert movement(1e-5) < 1e-7 < 1e-6 < movement(None)


def test_validation_logs_a_distance_and_the_teacher_is_guided_as_the_recipe_says(world):
    folder, values = world
    trainer = run(
        values, max_train_steps=2, validation_steps=2, evaluation={"validation_samples": 50}, guidance_scale=2.0,
        guidance_interval=[0.2, 1.4],
    )  # fmt: skip
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("frechet_distance/2", 0) > 0] == [0, 2]
    plain = teachers.load(folder / "teacher")
    assert (trainer.teacher.guidance_scale, trainer.teacher.guidance_interval) == (2.0, (0.2, 1.4))
    assert build_teacher(trainer.recipe, plain).guidance_scale == 2.0 and plain.guidance_scale == 1.0


def test_a_teacher_is_guided_by_another_network(world, capsys):
    folder, values = world
    weaker = str(folder / "weaker")
    values |= {"guidance_scale": 2.0, "guidance_teacher": weaker}
    trainer = Trainer(parse_recipe(values, "test"))
    guide = trainer.teacher.guidance_teacher
    assert equal_modules(guide, teachers.load(weaker)) and not any(p.requires_grad for p in guide.parameters())
    assert not guide.training and trainer.student.guidance_teacher is None and trainer.network.guidance_teacher is None
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    quick = ["evaluation.features=pixels", "evaluation.num_samples=50", "evaluation.teacher_steps=2"]
    assert main([str(path), "max_train_steps=2", "evaluation.num_inference_steps=[1]", *quick]) == 0
    assert teachers.load_config(folder / "run")["training"]["guidance_teacher"] == weaker
    student = load_file(folder / "run/student/model.safetensors")
    assert student.keys() == trainer.network.native.state_dict().keys()


def test_samples_of_a_guided_teacher_are_cached_apart(world):
    folder, values = world
    values |= {"data": {"source": "teacher", "num_teacher_samples": 8, "teacher_steps": 2}, "guidance_scale": 2.0}
    teacher, images = teachers.load(folder / "teacher"), []
    for changes in ({}, {"guidance_teacher": str(folder / "weaker")}):
        recipe = parse_recipe({**values, **changes}, "test")
        images.append(teacher_samples(build_teacher(recipe, teacher), recipe, folder / "cache")[0])
    assert len(list((folder / "cache").iterdir())) == 2 and not torch.equal(*images)


def test_check_counts_the_guidance_teacher(world, make_teacher):
    folder, values = world
    large = make_teacher("SiT", hidden_size=192, depth=4)
    teachers.save_pretrained(large, folder / "large", "teacher")

    def weights_in_mib(**changes):
        printed = check(parse_recipe({**values, "guidance_scale": 2.0, **changes}, "test"))
        return int(re.search(r"\(([\d,]+) for weights", printed)[1].replace(",", ""))

    added = weights_in_mib(guidance_teacher=str(folder / "large")) - weights_in_mib()
    assert abs(added - 4 * sum(p.numel() for p in large.parameters()) / 2**20) <= 1


def test_a_teacher_in_memory_keeps_its_guidance_teacher(world, make_teacher):
    folder, values = world
    guide = make_teacher("SongUNet", classes=None, label_dim=0)
    teacher = make_teacher("SongUNet").guided_by(1.5, None, guide)
    recipe = parse_recipe({**values, "teacher": "in memory", "guidance_scale": 2.0}, "test")
    assert build_teacher(recipe, teacher).guidance_teacher is guide
    recipe.guidance_teacher = str(folder / "weaker")
    assert build_teacher(recipe, teacher).guidance_teacher.source == str(folder / "weaker")


def test_the_licence_of_a_student_of_two_teachers(world, make_teacher):
    folder, values = world
    for license, expected in (("apache-2.0", "apache-2.0"), ("cc-by-nc-sa-4.0", "other")):
        for name, own in (("teacher", "apache-2.0"), ("weaker", license)):
            teachers.save_pretrained(make_teacher("SongUNet"), folder / name, "teacher", training={"license": own})
        guided = {"guidance_scale": 2.0, "guidance_teacher": str(folder / "weaker")}
        assert Trainer(parse_recipe({**values, **guided}, "test")).license == expected


def test_guidance_teachers_that_do_not_fit_are_refused(world, make_teacher):
    folder, values = world
    values |= {"guidance_scale": 2.0, "guidance_teacher": str(folder / "other")}
    with pytest.raises(FileNotFoundError, match="no model"):
        run(values)
    for changes, message in (
        (dict(num_classes=2, classes=2), "guidance teacher '.*other' has 2 classes, the teacher that it guides has 3"),
        (dict(input_size=4), "guidance teacher '.*other' has sample_shape"),
    ):
        other = make_teacher("SiT", **changes)
        other.sample_shape = (1, changes.get("input_size", 8), changes.get("input_size", 8))
        teachers.save_pretrained(other, folder / "other", "teacher")
        with pytest.raises(ValueError, match=message):
            run(values)
    teachers.save_pretrained(make_teacher("SiT"), folder / "other", "student")
    with pytest.raises(ValueError, match="other' is a student"):
        run(values)
    alone = make_teacher("SongUNet", classes=None, label_dim=0)
    teachers.save_pretrained(alone, folder / "alone", "teacher")
    with pytest.raises(ValueError, match="alone' is unconditional and can be guided by a guidance_teacher only"):
        run(values, teacher=str(folder / "alone"), num_classes=None, guidance_teacher=None)
    trainer = Trainer(
        parse_recipe({**values, "teacher": str(folder / "alone"), "num_classes": None, "guidance_scale": [1.0, 2.0],
                      "guidance_teacher": str(folder / "alone")}, "test")
    )  # fmt: skip
    assert trainer.network.accepts_guidance


class Point(torch.nn.Module):
    """The exact TrigFlow network of data that are one image with all pixels 0.25, and its error times ``scale``."""

    def __init__(self, scale):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))

    def forward(self, x, time):
        t, x_t = time.view(-1, 1, 1, 1), x * 0.5
        return (t.cos() * x_t - 0.25 * self.scale) / (t.sin() * 0.5)


def test_endpoint_error_against_a_closed_form():
    exact, wrong = (teachers.wrap(Point(scale), teachers.TRIGFLOW, 0.5, (1, 8, 8)) for scale in (1.0, 1.2))
    endpoint = EndpointError(exact, torch.full((4, 1, 8, 8), 0.25), None)
    assert all(error < 1e-3 for error in endpoint(exact).values())
    # f = 0.25 * scale at every t, so the error is 0.25 * 0.2 / 0.5.
    assert all(abs(error - 0.1) < 1e-3 for error in endpoint(wrong).values())


def test_a_rising_endpoint_error_is_seen():
    history = [{0.3: value} for value in (0.10, 0.05, 0.055)]
    assert not rising_at_small_t(history) and not rising_at_small_t(history[:1])
    assert rising_at_small_t([*history, {0.3: 0.061}])


def test_a_teacher_is_trained_further(world):
    folder, values = world
    trainer = run({**values, "objective": "diffusion", "max_train_steps": 1})
    before, after = teachers.load(folder / "teacher").state_dict(), trainer.network.state_dict()
    moved = [(after[k] - before[k]).abs().max().item() for k in before if before[k].is_floating_point()]
    assert 0 < max(moved) < 5e-3  # one step of 1e-3 from the teacher's weights
    assert trained_model(trainer).role == "teacher"


def test_training_keeps_the_magnitude_of_edm2_weights(world):
    _, values = world
    config = dict(img_resolution=8, img_channels=1, label_dim=3, model_channels=16, channel_mult=[1, 2], num_blocks=1,
                  attn_resolutions=[4], channels_per_head=16, label_dropout=0.1)  # fmt: skip
    network = {"name": "EDM2UNet", "config": config, "parameterization": "EDM", "label_format": "one_hot"}
    changes = {"objective": "diffusion", "teacher": None, "network": network, "label_dropout": 0.1}
    native = run({**values, **changes, "optimizer": {"learning_rate": 0.1, "name": "adam"}}).network.native
    for name, p in native.named_parameters():
        if p.ndim > 1:
            rms = p.square().mean(list(range(1, p.ndim))).sqrt()
            torch.testing.assert_close(rms, torch.ones_like(rms), rtol=2e-3, atol=2e-3, msg=name)
    assert native.out_gain != 0  # it was trained


def test_stable_targets_train_a_teacher(world):
    _, values = world
    values |= {"objective": "diffusion", "max_train_steps": 1}
    plain, stable = run(values, label_dropout=0.0), run(values, label_dropout=0.0, stable_targets=True)
    moved = [(a - b).abs().max() for a, b in zip(plain.network.parameters(), stable.network.parameters(), strict=True)]
    assert max(moved) > 0
    with pytest.raises(ValueError, match="stable_targets belongs to objective diffusion"):
        run(values, objective="distillation", stable_targets=True)


def test_a_network_of_another_kind_learns_a_teachers_velocity(world, make_teacher):
    folder, values = world
    teachers.save_pretrained(make_teacher("SiT", depth=1), folder / "other", "teacher")
    teachers.save_pretrained(make_teacher("SongUNet", **SMALL_UNET), folder / "teacher", "teacher")
    values |= {"objective": "diffusion", "velocity_teacher": str(folder / "other")}
    trainer = run(values, max_train_steps=40, validation_steps=40, checkpointing_steps=40)
    assert trained_model(trainer).role == "teacher"
    generator = torch.Generator().manual_seed(0)
    t, labels = torch.linspace(0.1, 1.5, 32), torch.arange(32) % 3
    point = torch.randn(32, 1, 8, 8, generator=generator) * 0.5, t, labels
    with torch.no_grad():
        target = teachers.load(folder / "other")(*point)
        before, after = (
            (network(*point) - target).square().mean() for network in (teachers.load(folder / "teacher"), trainer.network)
        )
    assert after < 0.7 * before
    with pytest.raises(ValueError, match="two sources"):
        run(values, stable_targets=True)
    with pytest.raises(ValueError, match="velocity_teacher belongs to objective diffusion"):
        run(values, objective="distillation")
    teachers.save_pretrained(make_teacher("SongUNet", sigma_data=0.7), folder / "edm", "teacher")
    with pytest.raises(ValueError, match=r"edm' has sigma_data 0.7, the recipe says 0.5"):
        run(values, velocity_teacher=str(folder / "edm"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(values, velocity_teacher=str(folder / "nowhere"))


EDM2 = dict(
    img_resolution=8, img_channels=1, label_dim=3, model_channels=16, channel_mult=[1, 2], num_blocks=1,
    attn_resolutions=[4], channel_mult_noise=4, label_dropout=0.1,
)  # fmt: skip


def test_a_teacher_gets_a_smooth_time_and_a_student_starts_from_it(world, capfd):
    folder, values = world
    torch.manual_seed(0)
    native = teachers.networks.build("EDM2UNet", EDM2)
    for name, parameter in native.named_parameters():
        if name.endswith("gain"):  # zero at first: then time and labels do not matter
            parameter.data.fill_(0.5)
    teachers.save_pretrained(teachers.wrap(native, teachers.EDM, 0.5, (1, 8, 8), 3, "one_hot"), folder / "edm2", "teacher")
    values |= {"teacher": str(folder / "edm2"), "gradient_accumulation_steps": 1}
    smooth = {**values, "objective": "retrofit", "output_dir": str(folder / "smooth"), "validation_steps": 3}
    trainer = run(smooth, max_train_steps=9, max_velocity_error=1e-9)
    assert trainer.step == 9 and "is still above 1e-09: train longer" in capfd.readouterr().out
    lines = [json.loads(line) for line in (folder / "smooth/metrics.jsonl").read_text().splitlines()]
    errors = [line["velocity_error"] for line in lines if "velocity_error" in line]
    assert len(errors) == 4 and errors[-1] < errors[0]
    assert run(smooth, max_train_steps=9, max_velocity_error=(errors[0] + errors[1]) / 2).step == 3
    early = run(smooth, max_train_steps=9, max_velocity_error=10.0)
    assert early.step == 0 and "done" in capfd.readouterr().out
    model = trained_model(early)
    save_model(model, folder / "smooth/student")
    assert model.role == "teacher" and model.network.parameterization.time == "trigflow"

    student = Trainer(parse_recipe({**values, "student": str(folder / "smooth")}, "test"))
    student.backward(0, torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]))
    assert all(torch.isfinite(p.grad).all() for p in student.network.parameters() if p.grad is not None)
    assert student.teacher.parameterization.time == "log_sigma/4"  # the velocity is still the original's
    assert trained_model(student).network.parameterization.time == "trigflow"
    with pytest.raises(ValueError, match="has a smooth time embedding already"):
        run(smooth, teacher=str(folder / "smooth"))
    with pytest.raises(ValueError, match="student belongs to objectives distillation and vsd"):
        run(smooth, student=str(folder / "smooth"))
    with pytest.raises(ValueError, match="remove network"):
        run(smooth, network={"name": "SiT", "parameterization": "SIT", "config": {}})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(values, student=str(folder / "nowhere"))


def test_dropout_of_a_network_of_diffusers_is_set_without_a_warning():
    network = teachers.networks.build("DiffusersUNet2D", {"config": {**UNET2D, "dropout": 0.3}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_dropout(network, 0.2)
    layers = [module.p for module in network.modules() if isinstance(module, torch.nn.Dropout)]
    assert layers and set(layers) == {0.2}


def test_label_dropout_needs_a_null_class(world, make_teacher):
    folder, values = world
    teachers.save_pretrained(make_teacher("SiT", class_dropout_prob=0.0), folder / "no-null", "teacher")
    values |= {"objective": "diffusion", "teacher": str(folder / "no-null"), "dropout": 0.0}
    with pytest.raises(ValueError, match="no null class"):
        run(values)
    run(values, label_dropout=0.0, max_train_steps=1)


def test_ema_profiles():
    assert abs(power_exponent(0.05) - 16.97) < 0.01 and abs(power_exponent(0.10) - 6.94) < 0.01
    with pytest.raises(ValueError, match="sigma_rel must be in"):
        power_exponent(0.5)
    network = torch.nn.Linear(1, 1)
    power, half = EMA(network, sigma_rel=0.1), EMA(network, half_life_images=100)
    history = []
    for step in range(1, 401):
        network.weight.data.fill_(step / 400)
        history.append(step / 400)
        update_averages([power, half], network, step * 10, 10)
    tau = torch.tensor(history, dtype=torch.float64)
    profile = tau ** power_exponent(0.1)
    expected = (profile * tau).sum() / profile.sum()
    assert abs(power.network.weight.item() - expected) < 2e-3
    decay = 0.5 ** (10 / 100)
    steps = torch.arange(400, dtype=torch.float64)
    expected = ((1 - decay) * decay**steps * tau.flip(0)).sum()
    assert abs(half.network.weight.item() - expected) < 2e-3


def test_learning_rate_schedules(world):
    _, values = world
    config = parse_recipe({**values, "optimizer": {"learning_rate": 1.0, "lr_warmup_steps": 4}}, "t").optimizer
    assert [learning_rate(config, s, 10) for s in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]
    config.lr_scheduler, config.lr_warmup_steps = "inverse_sqrt", 0
    config.lr_reference_steps = 100
    assert learning_rate(config, 50, 1000) == 1.0 and learning_rate(config, 400, 1000) == 0.5
    config.lr_scheduler = "linear"
    assert learning_rate(config, 5, 10) == 0.5


PLAIN = {"radam": torch.optim.RAdam, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


@pytest.mark.parametrize(
    "name, betas", [("radam", (0.9, 0.99)), ("radam", (0.0, 0.999)), ("adam", (0.5, 0.9)), ("adamw", (0.5, 0.9))]
)
def test_an_optimizer_is_pytorchs_plain_one(name, betas):
    """The fused ones take the same steps; RAdam's first ones are of another kind. It goes on from PyTorch's state too."""
    config = OptimizerConfig(name, learning_rate=1e-2, beta1=betas[0], beta2=betas[1], weight_decay=0.1)
    plain = dict(lr=1e-2, betas=betas, eps=1e-8, weight_decay=0.1, foreach=False)
    builds = [lambda p: build_optimizer(config, p), lambda p: PLAIN[name](p, **plain)]
    ends = []
    for first, then in (builds, builds[1:] * 2, builds[::-1], builds[:1] * 2):
        torch.manual_seed(0)
        parameters = [torch.randn(3, 4, requires_grad=True), torch.randn(5, requires_grad=True)]
        optimizer = first(parameters)
        for step in range(24):
            if step == 12:
                state, optimizer = optimizer.state_dict(), then(parameters)
                optimizer.load_state_dict(state)
            for p in parameters:
                p.grad = torch.randn_like(p)
            optimizer.step()
        assert optimizer.param_groups[0]["lr"] == 1e-2
        ends.append(parameters)
    for each in ends[1:]:
        for a, b in zip(ends[0], each, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
