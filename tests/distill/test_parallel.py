"""Several processes train exactly as one does: DDP, FSDP2 and HSDP, by the trainer itself, on CPUs."""

import pytest
import torch
from conftest import small_teacher
from datasets import Dataset, Features, Image, Value
from processes import launch, train, train_all

import teachers

STEPS = 10
OBJECTIVES = {
    "sCD": {},
    "sCT": {"objective": "training"},
    "VSD": {"objective": "vsd", "vsd": {}},
    "sCD+VSD": {"vsd": {"weight": 0.5}},
}
REFERENCES = {}  # what one process trained, by recipe
BOTH = {"activation_checkpointing": True, "gradient_accumulation_steps": 2}
# What else is sharded: a guidance teacher, the average that targets come from, parameters without dimensions.
EVERYTHING = {
    "teacher": "EDM2UNet", "guidance_teacher": "SongUNet", "guidance_scale": 2.0, "target_half_life_images": 30.0,
    "segments": {"everywhere_share": 0.0, "below": 0.5},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    for kind in ("SiT", "EDM2UNet", "SongUNet"):
        teachers.save_pretrained(small_teacher(kind), folder / kind, "teacher")
    generator = torch.Generator().manual_seed(0)
    pixels = (torch.randn(40, 8, 8, generator=generator) * 68 + 127).clamp(0, 255).byte().numpy()
    features = Features({"image": Image(), "label": Value("int64")})
    rows = Dataset.from_dict({"image": list(pixels), "label": [i % 3 for i in range(40)]}, features=features)
    rows.to_parquet(folder / "train.parquet")
    return folder


def recipe(folder, **changes):
    changes = {key: str(folder / value) if key.endswith("teacher") else value for key, value in changes.items()}
    return dict(
        objective="distillation", teacher=str(folder / "SiT"), output_dir=str(folder / "run"), sigma_data=0.5,
        sample_shape=[1, 8, 8], num_classes=3, data={"source": str(folder / "train.parquet")}, max_train_steps=STEPS,
        train_batch_size=8, tangent={"warmup_steps": 0}, optimizer={"learning_rate": 1e-2}, ema=[{"half_life_images": 50}],
    ) | changes  # fmt: skip


def exact(folder, cases, world, **environment):
    """Train every case by ``world`` processes, and compare with one process."""
    codes = launch(world, train_all, {name: (values, STEPS) for name, values in cases.items()}, folder, **environment)
    assert codes == [0] * world
    for name, values in cases.items():
        alone = {**values, "distributed": None, "activation_checkpointing": False}
        if repr(alone) not in REFERENCES:
            REFERENCES[repr(alone)] = train(alone, STEPS)
        check_same(torch.load(folder / f"{name}.pt"), REFERENCES[repr(alone)], name)


def check_same(found, expected, name):
    for key, gradient in expected["gradients"].items():
        error = (found["gradients"][key] - gradient.reshape(found["gradients"][key].shape)).norm() / gradient.norm()
        assert error < 1e-5, f"{name}: the gradient of {key} is off by {error:.1e}"
    for module, state in expected["states"].items():
        other = found["states"][module]
        assert state.keys() == other.keys()
        a, b = (torch.cat([s[key].double().flatten() for key in state]) for s in (state, other))
        error = (a - b).norm() / a.norm()
        assert error < 1e-5, f"{name}: {module} is off by {error:.1e}"
    for key, value in expected["logs"].items():
        assert found["logs"][key] == pytest.approx(value, rel=1e-4), f"{name}: {key}"


def test_two_processes_train_as_one(folder):
    cases = {
        f"{name}{' both' if extra else ''} {kind}": recipe(folder, **changes, **extra, distributed=kind)
        for name, changes in OBJECTIVES.items() for extra in ({}, BOTH) for kind in ("ddp", "fsdp")
    } | {"everything fsdp": recipe(folder, **EVERYTHING, distributed="fsdp")}  # fmt: skip
    exact(folder, cases, 2)


def test_four_processes_train_as_one(folder):
    cases = {
        "sCD ddp 4": recipe(folder, **BOTH, distributed="ddp"),
        "sCT fsdp 4": recipe(folder, **OBJECTIVES["sCT"], distributed="fsdp"),
        "VSD hsdp 4": recipe(folder, **OBJECTIVES["VSD"], distributed="hsdp"),
    }
    exact(folder, cases, 4, LOCAL_WORLD_SIZE="2")
