"""Released checkpoints of diffusion transformers: written here in the published formats, read by their tensors alone."""

import argparse
import json
import os
import pathlib
import zipfile

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import save_file

import teachers
from distill import cli
from distill.jvp import check_jvp
from teachers import checkpoints
from teachers.networks import SiT, build

SIZES = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=48, depth=2, num_heads=2, num_classes=3)
HEADS = {"network_config": {"num_heads": 2}}  # of no published size, so the file cannot tell
LIGHTNING = dict(use_swiglu=True, use_rope=True, use_rmsnorm=True)
FAMILIES = {  # name: network, its own arguments, parameterization
    "sit": ("SiT", {}, teachers.SIT),
    "dit": ("SiT", {}, teachers.DIT),
    "repa": ("SiT", {"learn_sigma": False}, teachers.RECTIFIED_FLOW),
    "lightning-dit": ("LightningDiT", LIGHTNING, teachers.SIT),
}


def network_of(family, **changes):
    """A tiny network with random weights; zero-initialised layers are perturbed so that they matter."""
    torch.manual_seed(0)
    kind, own, _ = FAMILIES[family]
    network = build(kind, {**SIZES, **own, **changes})
    for p in network.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return network.eval()


def with_projectors(tensors):
    """As REPA's training saves it: its projectors are part of the network."""
    return {**tensors, "projectors.0.0.weight": torch.randn(16, 48), "projectors.0.0.bias": torch.randn(16)}


def in_training(tensors):
    """What the training scripts of DiT, SiT and REPA save: two state dicts, the optimizer and the options."""
    stale = {key: torch.zeros_like(value) for key, value in tensors.items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}
    options = argparse.Namespace(model="SiT-XL/2", lr=1e-4)
    return {"model": stale, "ema": tensors, "opt": optimizer, "args": options, "steps": 7}


def hint(path, **values):
    checkpoints.hint_path(path).write_text(json.dumps(values))


def same_tensors(ours, theirs):
    return list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in theirs)


FORMATS = {
    "zip": lambda value, path: torch.save(value, path),
    "legacy": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    "safetensors": lambda value, path: save_file(value.get("ema", value), path),
}


@pytest.mark.parametrize("container", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_becomes_a_teacher_bit_for_bit(tmp_path, family, container):
    network, path = network_of(family), tmp_path / "weights"  # the name says nothing
    tensors = network.state_dict()
    FORMATS[container](in_training(with_projectors(tensors) if family == "repa" else tensors), path)
    hint(path, family=family, **HEADS)
    teacher = teachers.load(path)
    assert checkpoints.container(path) == container
    assert same_tensors(teacher.native.state_dict(), tensors)
    assert teacher.parameterization == FAMILIES[family][2] and teacher.sigma_data == 1.0
    assert teacher.sample_shape == (4, 8, 8) and teacher.num_classes == 3 and teacher.label_format == "index"
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 1.4]), torch.tensor([0, 3])
    with torch.no_grad():
        assert torch.equal(teacher.native(x, t, y), network(x, t, y))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_file_is_the_same_teacher(tmp_path, capsys, family):
    path, folder = tmp_path / "0400000.pt", tmp_path / "folder"
    torch.save({"ema": {key: value.half() for key, value in network_of(family).state_dict().items()}}, path)
    hint(path, family=family, sigma_data=0.8, **HEADS)
    assert cli.main(["teachers", "convert", str(path), str(folder)]) == 0
    assert cli.main(["teachers", "inspect", str(path)]) == 0
    assert "kind: checkpoint" in capsys.readouterr().out
    ours, theirs = teachers.load(folder), teachers.load(path)
    assert teachers.load_config(folder) == teachers.load_config(path)
    assert ours.sigma_data == 0.8 and same_tensors(ours.native.state_dict(), theirs.native.state_dict())
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 1.5]), torch.tensor([0, 3])
    with torch.no_grad():
        assert torch.equal(ours(x, t, y), theirs(x, t, y))


def test_a_published_size_needs_no_more_than_its_family(tmp_path):
    path = tmp_path / "DiT-S-2-256x256.pt"
    published = dict(input_size=32, hidden_size=384, depth=12, num_heads=6)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in SiT(**published).state_dict().items()}
    # One number, seen in every shape: real names and shapes in a small file.
    torch.save({key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}, path)
    hint(path, family="dit")
    config, tensors = checkpoints.read_checkpoint(path)
    defaults = dict(patch_size=2, in_channels=4, mlp_ratio=4.0, num_classes=1000, learn_sigma=True, qk_norm=False)
    assert config["network_config"] == {**published, **defaults}
    assert {key: value.shape for key, value in tensors.items()} == shapes


@pytest.mark.parametrize("hidden, depth, heads", [(384, 12, 6), (768, 12, 12), (1024, 24, 16), (1152, 28, 16)])
@pytest.mark.parametrize("size, patch, learn_sigma", [(32, 2, True), (64, 4, True), (32, 8, False)])
def test_arguments_are_read_from_shapes(hidden, depth, heads, size, patch, learn_sigma):
    arguments = dict(
        input_size=size, patch_size=patch, in_channels=4, hidden_size=hidden, depth=depth, num_heads=heads, mlp_ratio=4.0,
        num_classes=1000, learn_sigma=learn_sigma, qk_norm=False,
    )  # fmt: skip
    with torch.device("meta"):
        tensors = build("SiT", arguments).state_dict()
    assert teachers.dit.sit_config(tensors)["network_config"] == arguments


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_qknorm": True},
        {"use_qknorm": True, "use_rmsnorm": False},
        {"use_rope": False, "hidden_size": 1536, "depth": 24, "num_heads": 24},
        {"use_swiglu": False, "wo_shift": True},
        {"mlp_ratio": 3.0, "input_size": 32, "patch_size": 2, "in_channels": 16, "learn_sigma": True},
    ],
)
def test_arguments_of_lightning_dit_are_read_from_shapes(changes):
    arguments = dict(
        input_size=16, patch_size=1, in_channels=32, hidden_size=1152, depth=28, num_heads=16, num_classes=1000,
        learn_sigma=False, mlp_ratio=4.0, use_qknorm=False, **LIGHTNING, wo_shift=False,
    )  # fmt: skip
    with torch.device("meta"):
        tensors = build("LightningDiT", {**arguments, **changes}).state_dict()
    assert teachers.dit.is_lightning_dit(tensors) and not teachers.dit.is_sit(tensors)
    assert teachers.dit.lightning_dit_config(tensors)["network_config"] == {**arguments, **changes}


@pytest.mark.parametrize("entry", ["ema", "ema_model", "model_ema", "state_dict_ema", "model", "state_dict"])
def test_averaged_weights_go_before_the_current_ones(tmp_path, entry):
    tensors, path = network_of("sit").state_dict(), tmp_path / "x.pt"
    torch.save({"epoch": 3, "model": {}, "state_dict": {}, entry: tensors} if "ema" in entry else {entry: tensors}, path)
    hint(path, family="sit", **HEADS)
    assert same_tensors(checkpoints.read_checkpoint(path)[1], tensors)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_dropped(tmp_path, prefix):
    tensors, path = network_of("lightning-dit").state_dict(), tmp_path / "x.pt"
    torch.save({prefix + key: value for key, value in tensors.items()}, path)
    assert same_tensors(checkpoints.read_checkpoint(path)[1], tensors)


def test_lightning_dit_needs_no_hint(tmp_path):
    path = tmp_path / "lightningdit.pt"
    torch.save({"ema": network_of("lightning-dit").state_dict(), "config": {"train": {"lr": 2e-4}}}, path)
    config = teachers.load_config(path)
    assert config["network"] == "LightningDiT" and config["network_config"]["num_heads"] == 2  # from the rotary table


def test_an_old_repa_file_has_its_blocks_in_two_rows(tmp_path):
    tensors, path = network_of("repa").state_dict(), tmp_path / "x.pt"
    old = {key.replace("blocks.1.", "decoder_blocks.0."): value for key, value in tensors.items()}
    torch.save({"ema": with_projectors(old)}, path)
    hint(path, **HEADS)  # no family: projectors are REPA's alone
    config, ours = checkpoints.read_checkpoint(path)
    assert same_tensors(ours, tensors) and config["network_config"]["depth"] == 2


def test_a_compressed_archive_is_read_right(tmp_path):
    """As left by unpacking and packing again; mapped into memory its tensors would be noise."""
    tensors, path, packed = network_of("lightning-dit").state_dict(), tmp_path / "x.pt", tmp_path / "packed.pt"
    torch.save(tensors, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert same_tensors(checkpoints.read_checkpoint(packed)[1], tensors)


def test_another_family_is_one_line(tmp_path, monkeypatch):
    def config(tensors):
        return {
            "role": "teacher", "network": "SiT", "network_config": {**SIZES, "num_heads": None},
            "parameterization": teachers.SIT.to_dict(), "sigma_data": 1.0, "sample_shape": [4, 8, 8], "num_classes": 3,
            "label_format": "index",
        }  # fmt: skip

    def own(tensors):
        return {key.removeprefix("inner."): value for key, value in tensors.items()}

    mine = checkpoints.Family("mine", lambda tensors: "inner.pos_embed" in tensors, config, own)
    monkeypatch.setattr(checkpoints, "FAMILIES", (*checkpoints.FAMILIES, mine))
    tensors, path = network_of("sit").state_dict(), tmp_path / "x.pt"
    torch.save({f"inner.{key}": value for key, value in tensors.items()}, path)
    with pytest.raises(ValueError, match="does not tell num_heads"):
        teachers.load(path)
    hint(path, **HEADS)
    assert same_tensors(teachers.load(path).native.state_dict(), tensors)


def test_safetensors_of_a_model_folder_are_the_folder(tmp_path):
    teacher = teachers.wrap(network_of("sit"), teachers.SIT, 0.7, (4, 8, 8), 3)
    teachers.save_pretrained(teacher, tmp_path / "folder", role="teacher")
    assert teachers.load(tmp_path / "folder" / "model.safetensors").sigma_data == 0.7
    (tmp_path / "folder" / "config.json").unlink()
    with pytest.raises(ValueError, match="can be each of sit, dit"):
        teachers.load(tmp_path / "folder" / "model.safetensors")


def saved(tmp_path, value, **values):
    path = tmp_path / "x.pt"
    torch.save(value, path)
    if values:
        hint(path, **values)
    return path


def without(tensors, *names):
    return {key: value for key, value in tensors.items() if key not in names}


@pytest.mark.parametrize(
    "change, values, message",
    [
        (lambda t: t, {}, r"can be each of sit, dit, which its tensors do not tell apart: write \{\"family\": \"sit\"\}"),
        (lambda t: {**t, "final_layer.linear.weight": torch.zeros(16, 48)}, {}, "can be each of sit, dit, repa, which"),
        (lambda t: t, {"family": "sit"}, 'does not tell num_heads: write {"network_config": {"num_heads": ...}} into'),
        (lambda t: t, {"family": "repa"}, "cannot be of kind repa: its tensors fit sit, dit"),
        (lambda t: t, {"family": "lightning-dit"}, "cannot be of kind lightning-dit: its tensors fit sit, dit"),
        (lambda t: with_projectors({**t, "final_layer.linear.weight": torch.zeros(16, 48)}), {"family": "sit"},
         "cannot be of kind sit: its tensors fit repa"),
        (lambda t: t, {"family": "unet"}, "family is 'unet'; allowed: sit, dit, repa, lightning-dit"),
        (lambda t: t, {"familly": "sit"}, "must be a mapping with keys among family, network_config, sigma_data"),
        (lambda t: t, {"family": "sit", "network_config": 3}, "network_config must be a mapping"),
        (lambda t: t, {"family": "sit", "network_config": {"num_heads": 2, "deep": 1}}, "SiT has no argument 'deep'"),
        (lambda t: t, {"family": "sit", "network_config": {"num_heads": 5}}, "not a multiple of 4 and of num_heads 5"),
        (lambda t: t, {"family": "sit", "sigma_data": "one", **HEADS}, "pt.json: sigma_data must be a positive number"),
        (lambda t: t, {"family": "sit", "sigma_data": True, **HEADS}, "sigma_data must be a positive number, got True"),
        (lambda t: t, {"family": "sit", "sigma_data": float("inf"), **HEADS}, "sigma_data must be a positive number"),
        (lambda t: t, {"family": ["sit"]}, r"family is \['sit'\]; allowed: sit, dit"),
        (lambda t: t, {"family": "sit", "network_config": {"num_heads": "2"}}, "num_heads must be a whole number, got '2'"),
        (lambda t: t, {"family": "sit", "network_config": {"num_heads": [2]}}, r"must be a whole number, got \[2\]"),
        (lambda t: t, {"family": "sit", "network_config": {"num_heads": -2}}, "must be a whole number, got -2"),
        (lambda t: t, {"family": "sit", "network_config": {"num_heads": 0}}, "an argument is 0 that must not be"),
        (lambda t: t, {"family": "sit", "network_config": {"num_heads": 2, "mlp_ratio": "4"}}, "mlp_ratio must be a number"),
        (lambda t: t, {"family": "sit", "network_config": {"num_heads": 2, "learn_sigma": "no"}},
         "learn_sigma must be true or false, got 'no'"),
        (lambda t: without(t, "blocks.1.attn.proj.bias"), {"family": "sit", **HEADS},
         r"x.pt does not fit SiT: tensors 1 missing \(blocks.1.attn.proj.bias\)"),
        (lambda t: {**t, "extra.weight": torch.zeros(1)}, {"family": "sit", **HEADS}, r"1 unexpected \(extra.weight\)"),
        (lambda t: {**t, "x_embedder.proj.weight": torch.zeros(48, 16)}, {"family": "dit", **HEADS},
         "has the tensor names of dit but cannot be read as such"),
        (lambda t: without(t, "pos_embed"), {}, r"holds no network that is known \(sit, dit, repa, lightning-dit, openai\)"),
        (lambda t: {**t, "module.pos_embed": t["pos_embed"]}, {}, "holds tensors twice"),
        (lambda t: {"ema": {"decay": 0.999, "shadow": t}, "model": t}, {}, "its entry 'ema' is not a dictionary of tensors"),
        (lambda t: {"weights": t}, {}, "holds no dictionary of tensors, neither itself nor under ema, "),
        (lambda t: list(t.values()), {}, "holds no dictionary of tensors"),
        (lambda t: {}, {}, "holds no dictionary of tensors"),
        (lambda t: {"ema": t, "path": pathlib.PurePosixPath("a")}, {}, "asks for the global pathlib"),
    ],
)  # fmt: skip
def test_what_a_file_does_not_say_is_one_sentence(tmp_path, capsys, change, values, message):
    path = saved(tmp_path, change(network_of("sit").state_dict()), **values)
    with pytest.raises(ValueError, match=message) as error:
        teachers.load(path)
    assert "\n" not in str(error.value)
    assert cli.main(["teachers", "inspect", str(path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_a_hostile_file_does_nothing(tmp_path, container):
    path = tmp_path / "x.pt"
    FORMATS[container]({"ema": network_of("sit").state_dict(), "opt": Payload(tmp_path / "executed")}, path)
    with pytest.raises(ValueError, match=r"asks for the global (posix|nt).system"):
        teachers.load(path)
    with pytest.raises(ValueError, match="asks for the global"):
        FORMATS[container](Payload(tmp_path / "executed"), path)
        teachers.load(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("container", FORMATS)
def test_a_truncated_file_is_one_sentence(tmp_path, container):
    path = tmp_path / "x"
    FORMATS[container](network_of("sit").state_dict(), path)
    data = path.read_bytes()
    for end in (17, 40, len(data) // 3, len(data) // 2, len(data) - 3):
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match="not a readable (torch.save|safetensors) file") as error:
            teachers.load(path)
        assert "\n" not in str(error.value)
    path.write_bytes(data[:3])
    with pytest.raises(ValueError, match="is not a model: expected"):
        teachers.load(path)


def test_other_files_are_not_checkpoints(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    assert not checkpoints.is_checkpoint(path) and not checkpoints.is_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="neither by torch.save nor as safetensors"):
        checkpoints.read_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        checkpoints.read_checkpoint(tmp_path / "absent.pt")
    path = saved(tmp_path, network_of("sit").state_dict())
    checkpoints.hint_path(path).write_text("{")
    with pytest.raises(ValueError, match="x.pt.json is not valid JSON"):
        teachers.load(path)


def as_in_diffusers(tensors, depth):
    """The state dict of DiT under the names of ``DiTTransformer2DModel``, which embeds time and class in every block."""
    pairs = {
        "pos_embed.proj": "x_embedder.proj",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    }
    out = {}
    for i in range(depth):
        theirs, ours = f"transformer_blocks.{i}", f"blocks.{i}"
        pairs |= {
            f"{theirs}.norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
            f"{theirs}.norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
            f"{theirs}.norm1.linear": f"{ours}.adaLN_modulation.1",
            f"{theirs}.attn1.to_out.0": f"{ours}.attn.proj",
            f"{theirs}.ff.net.0.proj": f"{ours}.mlp.fc1",
            f"{theirs}.ff.net.2": f"{ours}.mlp.fc2",
        }
        out[f"{theirs}.norm1.emb.class_embedder.embedding_table.weight"] = tensors["y_embedder.embedding_table.weight"]
        for kind in ("weight", "bias"):
            parts = tensors[f"{ours}.attn.qkv.{kind}"].chunk(3)
            out |= {f"{theirs}.attn1.to_{name}.{kind}": part for name, part in zip("qkv", parts, strict=True)}
    return out | {f"{a}.{kind}": tensors[f"{b}.{kind}"] for a, b in pairs.items() for kind in ("weight", "bias")}


def test_dit_computes_what_diffusers_computes():
    network = network_of("dit")
    theirs = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=3, norm_eps=1e-6,
    ).eval()  # fmt: skip
    theirs.load_state_dict(as_in_diffusers(network.state_dict(), 2))  # all but the position table, which is not in it
    network.pos_embed.data = SiT(**SIZES).pos_embed.data
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # the original's frequencies, which diffusers does not keep
    x, k, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 2, 3])
    with torch.no_grad():
        expected = theirs(x, timestep=k, class_labels=y).sample[:, :4]
        ours = network(x, k.float(), y)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_network_is_differentiable_along_the_ode(tmp_path, family):
    path = tmp_path / "x.pt"
    torch.save(network_of(family).state_dict(), path)
    hint(path, family=family, **HEADS)
    check_jvp(teachers.load(path))


def test_an_openai_file_becomes_a_teacher(tmp_path):
    torch.manual_seed(0)
    arguments = dict(image_size=64, num_channels=32, num_res_blocks=1, num_head_channels=64, use_scale_shift_norm=False)
    native = build("OpenAIUNet", {**arguments, "attention_resolutions": [8]})
    torch.save(native.half().state_dict(), tmp_path / "edm_cat64_ema.pt")
    teacher = teachers.load(tmp_path / "edm_cat64_ema.pt")
    assert (teacher.sample_shape, teacher.num_classes, teacher.sigma_data) == ((3, 64, 64), None, 0.5)
    assert all(torch.equal(p, q.float()) for p, q in zip(teacher.native.parameters(), native.parameters(), strict=True))
    # Consistency models have the same tensors: only their names tell.
    for name in ("cd_cat256_lpips.pt", "ct_imagenet64.pt"):
        path = (tmp_path / "edm_cat64_ema.pt").rename(tmp_path / name)
        with pytest.raises(ValueError, match="it is distilled already and has no PF-ODE"):
            teachers.load(path)
        hint(path, family="openai")
        assert teachers.load(path).sample_shape == (3, 64, 64)
        path.rename(tmp_path / "edm_cat64_ema.pt")
