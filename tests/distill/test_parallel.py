"""Several processes train exactly as one does: DDP, FSDP2 and HSDP, by the trainer itself, on CPUs."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from conftest import small_teacher
from datasets import Dataset, Features, Image, Value
from parallel_runs import train
from safetensors.torch import load_file
from support import DIT, UNET2D

import teachers
from distill import parallel
from distill.data import StepSampler
from distill.noise import BatchGenerator, draw
from distill.recipe import parse_recipe
from distill.run import main
from distill.trainer import Trainer
from teachers.networks import build

STEPS = 10
OBJECTIVES = {
    "sCD": {},
    "sCT": {"objective": "training"},
    "VSD": {"objective": "vsd", "vsd": {}},
    "sCD+VSD": {"vsd": {"weight": 0.5}},
}
REFERENCES = {}  # what one process trained, by recipe
BOTH = {"activation_checkpointing": True, "gradient_accumulation_steps": 2}
SETTINGS = {
    "plain": {}, "checkpointed": {"activation_checkpointing": True}, "accumulated": {"gradient_accumulation_steps": 2},
    "both": BOTH,
}  # fmt: skip
# What else is sharded: a guidance teacher, the average that targets come from, parameters without dimensions.
EVERYTHING = {
    "teacher": "EDM2UNet", "guidance_teacher": "SongUNet", "guidance_scale": 2.0, "target_half_life_images": 30.0,
    "segments": {"everywhere_share": 0.0, "below": 0.5},
}  # fmt: skip


several_processes = pytest.mark.skipif(
    sys.platform != "linux", reason="forks processes, and watches them by Linux's means"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    for kind, smaller in (("SiT", {}), ("EDM2UNet", {"channel_mult": [1]}), ("SongUNet", {"channel_mult": [1]})):
        teachers.save_pretrained(small_teacher(kind, **smaller), folder / kind, "teacher")
    torch.manual_seed(0)
    dit = build("DiffusersDiT", {"config": {**DIT, "in_channels": 1, "out_channels": 2, "num_embeds_ada_norm": 3}})
    teachers.save_pretrained(teachers.wrap(dit, teachers.RECTIFIED_FLOW, 0.5, (1, 8, 8), 3), folder / "DiT", "teacher")
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


def exact(server, folder, cases, world, **environment):
    """Train every case by ``world`` processes, and compare with one process."""
    output = folder / f"{next(iter(cases))}.txt"
    statuses = server.launch(world, "parallel_runs:train_all", cases, STEPS, str(folder), output=output, **environment)
    assert statuses == [0] * world, output.read_text()
    for name, values in cases.items():
        alone = {**values, "distributed": None, "activation_checkpointing": False}
        if repr(alone) not in REFERENCES:
            REFERENCES[repr(alone)] = train(alone, STEPS)
        tolerance = 0.05 if values.get("mixed_precision") == "bf16" else 1e-5
        check_same(torch.load(folder / f"{name}.pt"), REFERENCES[repr(alone)], name, tolerance)


def check_same(found, expected, name, tolerance=1e-5):
    size = torch.stack([gradient.norm() for gradient in expected["gradients"].values()]).norm()
    for key, gradient in expected["gradients"].items():
        difference = found["gradients"][key] - gradient.reshape(found["gradients"][key].shape)
        error = difference.norm() / max(gradient.norm(), 0.01 * size)  # that of a bias of keys is 0 but for rounding
        assert error < tolerance, f"{name}: the gradient of {key} is off by {error:.1e}"
    for module, state in expected["states"].items():
        other = found["states"][module]
        assert state.keys() == other.keys()
        a, b = (torch.cat([s[key].double().flatten() for key in state]) for s in (state, other))
        error = (a - b).norm() / a.norm()
        assert error < tolerance, f"{name}: {module} is off by {error:.1e}"
    torch.testing.assert_close(found["outputs"], expected["outputs"], rtol=10 * tolerance, atol=tolerance)  # when gathered
    for key, value in expected["logs"].items():
        if key == "largest_tangent_norm":
            continue  # each process has the largest mean over its own samples
        assert found["logs"][key] == pytest.approx(value, rel=10 * tolerance), f"{name}: {key}"


def every(folder, kind, settings):
    """Recipes of every objective with each of the settings."""
    return {
        f"{name} {kind} {setting}": recipe(folder, **changes, **SETTINGS[setting], distributed=kind)
        for name, changes in OBJECTIVES.items() for setting in settings
    }  # fmt: skip


@several_processes
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one(server, folder, kind):
    exact(server, folder, every(folder, kind, SETTINGS), 2)


@several_processes
def test_two_processes_train_everything_in_shards(server, folder):
    cases = {"everything fsdp": recipe(folder, **EVERYTHING, distributed="fsdp")}
    cases["skipped fsdp"] = recipe(folder, distributed="fsdp", broken=[2, 5])
    # The blocks of a network of diffusers are gathered in bf16. A time in bf16 would make the gradient quite another one.
    cases["bf16 fsdp"] = recipe(folder, teacher="DiT", mixed_precision="bf16", distributed="fsdp", **BOTH)
    exact(server, folder, cases, 2)


@several_processes
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "hsdp"])
def test_four_processes_train_as_one(server, folder, kind):
    exact(server, folder, every(folder, kind, ("plain", "both")), 4, LOCAL_WORLD_SIZE="2")


def test_every_image_is_drawn_once_by_some_process():
    alone = list(StepSampler(50, 8, seed=3, start=0, stop=15))
    assert len({i for batch in alone[:6] for i in batch}) == 48
    for world in (2, 4):
        shares = [list(StepSampler(50, 8, 3, 0, 15, rank, world)) for rank in range(world)]
        assert [sum(step, []) for step in zip(*shares, strict=True)] == alone


def test_noise_belongs_to_samples_and_not_to_processes():
    shape = (6, 1, 3)
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    for world in (1, 2, 3):
        parts = [draw(torch.randn, (6 // world, 1, 3), BatchGenerator.seeded(5, rank, world)) for rank in range(world)]
        assert torch.equal(torch.cat(parts), whole)


LIGHTNING = dict(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=3, num_heads=2, num_classes=3)
OPENAI = dict(image_size=8, in_channels=3, out_channels=3, num_channels=32, num_res_blocks=1, channel_mult=(1, 2),
              attention_resolutions=(4,), num_head_channels=32)  # fmt: skip


@pytest.mark.parametrize(
    "name, config, expected, left_over",
    [
        ("SiT", None, {"Block": 2}, 0.5), ("LightningDiT", LIGHTNING, {"LightningBlock": 3}, 0.5),
        ("SongUNet", None, {"UNetBlock": 10}, 0.2), ("DhariwalUNet", None, {"UNetBlock": 10}, 0.2),
        ("EDM2UNet", None, {"EDM2Block": 10}, 0.2),
        ("OpenAIUNet", OPENAI, {"OpenAIResBlock": 10, "OpenAIAttention": 4}, 0.2),
        ("DiffusersUNet2D", {"config": UNET2D}, {"ResnetBlock2D": 8, "Attention": 4}, 0.3),
        ("DiffusersDiT", {"config": DIT}, {"BasicTransformerBlock": 2}, 0.3),
    ],
)  # fmt: skip
def test_blocks_hold_most_of_a_network(name, config, expected, left_over):
    network = small_teacher(name).native if config is None else build(name, config)
    found = parallel.blocks(network)
    kinds = [type(block).__name__ for block in found]
    assert {kind: kinds.count(kind) for kind in kinds} == expected
    modules = [module for block in found for module in block.modules()]
    assert len(set(modules)) == len(modules)  # none lies in another
    size = sum(p.numel() for block in found for p in block.parameters())
    assert 1 - size / sum(p.numel() for p in network.parameters()) < left_over


def kept_bytes(student, batch):
    """What a forward pass keeps for the backward pass."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = student(torch.zeros(batch, *student.sample_shape), torch.ones(batch), student.example_condition(batch))
    del result  # held the graph, and with it every storage, until all were seen
    return sum(kept.values())


def test_checkpointing_keeps_less_than_half_of_the_activations():
    def kept(checkpointed):
        student = small_teacher("SiT", depth=4)
        if checkpointed:
            parallel.checkpoint_activations(student.native)
        return kept_bytes(student, 9) - kept_bytes(student, 1)

    assert kept(True) < 0.5 * kept(False)


@several_processes
def test_a_run_in_shards_is_resumed_by_any_number_of_processes(server, folder, capsys):
    """Two processes train, validate, save, evaluate and go on; one process goes on from their checkpoint. EDM2's parameters
    without dimensions are vectors in shards.
    """
    values = recipe(
        folder, objective="diffusion", teacher="EDM2UNet", velocity_teacher="SiT", label_dropout=0.0,
        optimizer={"name": "adam"}, max_train_steps=6, checkpointing_steps=2, validation_steps=4, logging_steps=1,
        evaluation={"num_samples": 50, "teacher_steps": 1, "features": "pixels", "validation_samples": 0},
    )  # fmt: skip
    file, output, here = folder / "recipe.yaml", folder / "output.txt", f"output_dir={folder / 'shards'}"
    file.write_text(yaml.safe_dump(values))
    first = [str(file), here, "distributed=fsdp", "max_train_steps=4"]
    second = [str(file), here, "distributed=fsdp", "resume_from_checkpoint=latest"]
    for arguments in (first, second):
        assert server.launch(2, "distill.run:main", arguments, output=output) == [0, 0], output.read_text()
    assert main([str(file), f"output_dir={folder / 'alone'}"]) == 0
    names = [f"checkpoint-{file}" for file in ("4/network", "6/network", "6/ema-0", "6/weighting")]
    for name in (*names, "student/model"):
        alone, shards = (load_file(folder / run / f"{name}.safetensors") for run in ("alone", "shards"))
        assert alone.keys() == shards.keys()
        for key, tensor in alone.items():
            torch.testing.assert_close(shards[key].view_as(tensor), tensor, rtol=1e-4, atol=1e-6, msg=f"{name}: {key}")
    capsys.readouterr()
    resumed = {**values, "output_dir": str(folder / "other"), "resume_from_checkpoint": str(folder / "shards/checkpoint-4")}
    other = Trainer(parse_recipe(resumed, "test")).train().native.state_dict()
    printed = capsys.readouterr().out
    assert "processes: 1, until here 2; every step has the same images and noise, summed in another order" in printed
    assert "distributed: ddp, until here fsdp" in printed and "images per step" not in printed
    torch.testing.assert_close(dict(other), load_file(folder / "alone/student/model.safetensors"), rtol=1e-4, atol=1e-6)


@several_processes
@pytest.mark.parametrize("stuck", [False, True])
def test_one_failure_ends_all_processes_with_one_error(server, folder, stuck):
    file, output = folder / f"fail-{stuck}.yaml", folder / f"fail-{stuck}.txt"
    values = recipe(folder, objective="diffusion", label_dropout=0.0, output_dir=str(folder / "fails"))
    file.write_text(yaml.safe_dump(values))
    assert server.launch(2, "parallel_runs:fail", [str(file)], stuck, output=output) == [1, 1]
    text = output.read_text()
    assert text.count("error:") == 1 and "process 1: error: image 7 is damaged" in text and "Traceback" not in text


@several_processes
def test_stuck_processes_are_killed_and_show_where_they_were(server, tmp_path):
    pids, _store = server.start_all(2, "time:sleep", 1000, output=tmp_path / "output.txt")
    with pytest.raises(TimeoutError, match="2 processes did not end in 1 s") as raised:
        server.end(pids, tmp_path / "output.txt", limit=1)
    assert str(raised.value).count("most recent call first") == 2 and "fork_server.py" in str(raised.value)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize(
    "environment, changes, message",
    [
        ({"WORLD_SIZE": "3"}, {}, "train_batch_size 8 cannot be shared out equally over 3 processes"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "DeepSpeed cannot .* ZeRO-3 layers have no forward-mode derivative"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "Megatron-LM is not supported"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "set fsdp_version to 2 in accelerate config"),
        ({"WORLD_SIZE": "2"}, {"distributed": "fsdp", "lora": {}}, "lora does not go with distributed: fsdp"),
        ({"WORLD_SIZE": "2"}, {"tangent": {"shared_primal": True}}, "tangent.shared_primal needs one process, got 2: "),
        ({"WORLD_SIZE": "2"}, {"distributed": "fsdp", "compile": "inductor"}, "compile does not go with distributed: fsdp"),
        ({"WORLD_SIZE": "2"}, {"cpu_offload": True}, "cpu_offload needs distributed: fsdp or hsdp"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "3"}, {"distributed": "hsdp"}, "the same number of processes on every"),
        ({"ACCELERATE_TORCH_DEVICE": "abacus"}, {}, "the accelerator abacus cannot be used .*on CPUs: ACCELERATE_USE_CPU=1"),
        ({}, {"distributed": "zero"}, "distributed is 'zero'; allowed: null, ddp, fsdp, hsdp"),
    ],
)
def test_what_cannot_run_as_it_was_launched_is_refused(folder, monkeypatch, environment, changes, message):
    PartialState._reset_state()  # what an earlier test saw of the environment
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match=message):
        Trainer(parse_recipe(recipe(folder, **changes), "test"))
    AcceleratorState._reset_state(reset_partial_state=True)


def test_bf16_needs_a_device_that_has_it(folder, monkeypatch):
    monkeypatch.setattr(parallel, "is_bf16_available", lambda ignore_tpu: False)  # as on an old GPU
    with pytest.raises(ValueError, match="mixed_precision: bf16 needs a device that computes in bf16"):
        Trainer(parse_recipe(recipe(folder, mixed_precision="bf16"), "test"))


def test_what_accelerate_was_configured_for(folder, monkeypatch):
    plain = parse_recipe(recipe(folder), "test")
    assert parallel.technique(plain) == "ddp" and not parallel.checkpoints_activations(plain)
    for key in ("ACCELERATE_USE_FSDP", "FSDP_ACTIVATION_CHECKPOINTING", "FSDP_OFFLOAD_PARAMS"):
        monkeypatch.setenv(key, "true")
    assert parallel.technique(plain) == "fsdp" and parallel.checkpoints_activations(plain) and parallel.offloads(plain)
    assert parallel.technique(parse_recipe(recipe(folder, distributed="ddp"), "test")) == "ddp"
