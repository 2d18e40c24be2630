"""Damaged and hostile files through every loader: python tests/mutants.py FOLDER [ROUNDS].

Each file must load or give one sentence as a ValueError or OSError, within 5 seconds of CPU time (and a minute by the clock,
for what waits) and 1 GiB of memory, and without running anything, connecting to anything or opening a file outside. The
report is JSON on stdout: how many files of each kind were tried, and what went wrong. ROUNDS (by default 1) multiplies the
random ones.
"""

import argparse
import faulthandler
import io
import json
import os
import pickle
import pickletools
import random
import resource
import signal
import struct
import sys
import types
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pyarrow as pa
import torch
import yaml
from PIL import Image as Picture
from pyarrow import parquet
from support import DIT, UNET2D
from text_pipelines import pixart

import teachers
from distill import shards
from distill.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from distill.comparison.config import load_comparison
from distill.data import teacher_samples, training_data
from distill.latents import LATENTS, Latents
from distill.prompts import NULL, PROMPTS, Prompts
from distill.recipe import load_recipe, parse_recipe
from teachers.networks import build

SECONDS, WAIT, MEMORY = 5, 60, 2**30
SIT = dict(input_size=4, patch_size=2, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=2, learn_sigma=False)
RECIPE = dict(
    objective="diffusion", network={"name": "SiT", "config": SIT, "parameterization": "RECTIFIED_FLOW"}, output_dir="x",
    sigma_data=0.5, sample_shape=[1, 4, 4], num_classes=2, data={"source": "x"}, max_train_steps=2, train_batch_size=2,
)  # fmt: skip
COMPARISON = dict(output_dir="x", models=[{"name": "a", "source": "x", "steps": [1, 2]}], data={"source": "x"}, seeds=[0])


class Target(NamedTuple):
    """A loader with a file that it reads, the hostile versions of that file, and how many random ones there are."""

    path: Path
    load: Callable[[], Any]
    attacks: list[bytes]
    mutate: Callable[[random.Random, bytes], bytes]
    random: int


# ---- random changes ------------------------------------------------------------------------------------------------------


def damage(rng: random.Random, data: bytes) -> bytes:
    """What disks and bad copies do to bytes."""
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice([1, 4, 8, 64, 1000]))
    filling = rng.choice([b"", b"\0", b"\xff", b"\x7f", b"0", bytes([rng.randrange(256)])])
    return rng.choice([
        data[:start],
        data[:start] + bytes([data[start] ^ 1 << rng.randrange(8)]) + data[start + 1 :],
        data[:start] + filling * (end - start) + data[end:],
        data[:end] + data[start:],
        data[:start] + rng.randbytes(8) + data[start:],
    ])  # fmt: skip


def damage_early(rng: random.Random, data: bytes) -> bytes:
    """The same, often to the first part, where formats keep what they say of the rest."""
    head = min(len(data), rng.choice([400, 3000, len(data)]))
    return damage(rng, data[:head]) + data[head:]


VALUES = (
    None, True, -1, 0, 0.5, 10**9, 10**15, 10**30, 1e308, float("nan"), float("inf"), "", "x" * 10_000, "\0",
    "../../etc/passwd", [], [[]], {}, {"a": 1}, [10**9] * 3, ["x"] * 3, [1] * 100_000,
)  # fmt: skip


def change_json(rng: random.Random, data: bytes) -> bytes:
    """One value or key of a JSON file becomes another."""
    value = json.loads(data)
    place = value
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7:
            place = place[key]
            continue
        if isinstance(place, dict) and rng.random() < 0.2:
            place[str(rng.choice(VALUES))[:100]] = place.pop(key)
        else:
            place[key] = rng.choice(VALUES)
        return json.dumps(value).encode()


def damage_json(rng: random.Random, data: bytes) -> bytes:
    return (change_json if rng.random() < 0.8 else damage)(rng, data)


def change_header(rng: random.Random, data: bytes) -> bytes:
    """One value of the header of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    header = change_json(rng, data[8 : 8 + size])
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def damage_safetensors(rng: random.Random, data: bytes) -> bytes:
    return rng.choice([change_header, change_header, damage, damage_early])(rng, data)


# ---- hostile files -------------------------------------------------------------------------------------------------------

DEEP_JSON = b"[" * 200_000


class Call:
    """Pickles as a call of ``function`` with ``args``."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def nested_tuples(levels: int) -> tuple:
    """As a key of a dictionary it takes ``2 ** levels`` steps to hash."""
    value = ()
    for _ in range(levels):
        value = (value, value)
    return value


def key_bomb(protocol: int) -> bytes:
    """``{nested tuple: None}`` that is not hashed when it is written."""
    body = pickle.dumps(nested_tuples(40), protocol)
    body = body[body.index(b")") :] if protocol == 2 else pickletools.optimize(body)[2:]
    return bytes([0x80, protocol]) + b"}" + body.removesuffix(b".") + b"Ns."


def pickles(command: str) -> list[bytes]:
    attacks = [
        pickle.dumps(Call(os.system, command), protocol) for protocol in range(6)
    ] + [
        pickle.dumps(Call(exec, f"import os; os.system({command!r})"), protocol) for protocol in (2, 4)
    ] + [
        pickle.dumps(Call(eval, f"__import__('os').system({command!r})"), 4),
        pickle.dumps({"ema": Call(os.system, command)}, 4),
        pickle.dumps(Call(bytearray, 10**12), 4),
        key_bomb(4), b"\x80\x04.", b"\x80\x04", b"\x80\x05N.", b"\x80\x04h\x05.",
        b"\x80\x04" + b"(" * 100_000 + b"t" * 100_000 + b".",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x", b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b"\xff",
        b"\x80\x04" + b"]" + b"\x94h\x00a" * 50_000 + b".", b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".",
    ]  # fmt: skip
    return attacks


def archive(pickled: bytes, compression=zipfile.ZIP_STORED, **records: bytes) -> bytes:
    """A file by ``torch.save``."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as zipped:
        for name, data in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little", **records}.items():
            zipped.writestr(f"archive/{name.replace('_', '/')}", data)
    return file.getvalue()


def saved(value, **options) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def torch_files(command: str, tensors: dict[str, torch.Tensor]) -> list[bytes]:
    huge = {key: torch.zeros((), dtype=torch.half).expand(10**5, 10**5) for key in tensors}
    half = {key: torch.zeros((), dtype=torch.half).expand(2**30 // len(tensors)) for key in tensors}
    lie = saved(tensors)
    return [
        *(archive(pickled) for pickled in pickles(command)), archive(key_bomb(2)),
        saved(huge), saved({"model": half}), saved(tensors, _use_new_zipfile_serialization=False).replace(b"M", b"\xff"),
        archive(b"N." * 10, zipfile.ZIP_DEFLATED, data_0=bytes(2**28)), saved([tensors]), saved({"ema": None}),
        saved({"ema": {1: torch.zeros(1)}}), saved({key: value.to_sparse() for key, value in tensors.items()}),
        saved({key: torch.zeros(0) for key in tensors}), saved({key: torch.tensor(1.0) for key in tensors}),
        saved({key: value.to(torch.complex64) for key, value in tensors.items()}), lie[: len(lie) // 2],
        saved({key: torch.empty_like(value, device="meta") for key, value in tensors.items()}),
    ]  # fmt: skip


def headers(data: bytes) -> list[bytes]:
    """Hostile headers of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    first = next(iter(header))

    def with_first(**changes) -> bytes:
        text = json.dumps({**header, first: {**header[first], **changes}}).encode()
        return struct.pack("<Q", len(text)) + text + body

    return [
        struct.pack("<Q", 2**63) + data[8:], struct.pack("<Q", 2**64 - 1) + data[8:], struct.pack("<Q", 0) + data[8:],
        struct.pack("<Q", 10**8) + data[8:], struct.pack("<Q", len(DEEP_JSON)) + DEEP_JSON, b"", data[:8], data[:99],
        with_first(shape=[2**40] * 2), with_first(shape=[2**32, 2**32, 0]), with_first(shape=[-1]), with_first(shape=[]),
        with_first(data_offsets=[0, 2**60]), with_first(data_offsets=[2**60, 0]), with_first(data_offsets=[0, 0]),
        with_first(data_offsets=[-8, 8]), with_first(dtype="F8_E5M2"), with_first(dtype="X"), with_first(dtype=None),
        with_first(dtype="I64"), with_first(dtype="BOOL"),
    ]  # fmt: skip


def bomb(levels: int) -> str:
    """A billion laughs: a list in YAML that stands for ``10 ** levels`` items."""
    lists = [f"&a0 [{', '.join(['x'] * 10)}]"]
    lists += [f"&a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return f"[{', '.join(lists)}]"


def recipes(command: str, values: dict, keys: tuple[str, ...]) -> list[bytes]:
    """Hostile versions of a file of ``values``, at ``keys`` of it."""
    text = yaml.safe_dump(values)
    merges = "a0: &a0 {x: 1}\n" + "\n".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 9))
    tags = [
        f"!!python/object/apply:os.system ['{command}']", "!!python/object/new:os.system [x]", "!!python/name:os.system ''",
        "!!python/module:os ''", "!!python/tuple [1]", f"!!python/object/apply:subprocess.check_output [['{command}']]",
        "!!int ''", "!!int x", "!!float ''", "!!bool x", "!!timestamp x", "!!binary x", "!!null x", "!!set {a: b}",
        "!!omap [a]", "!!pairs [[1]]", "2001-99-99", "1" * 5000, ":".join(["59"] * 20_000), "0x" + "f" * 90_000, "&a [*a]",
        "&a {b: *a}", "[" * 50_000, "{a: " * 20_000, "? " * 20_000, "- " * 40_000, "'" + "x" * 90_000, ".inf", ".nan",
        "1e999",
        "*missing", "!<x> y", "&a &b c", "| " * 10, "\\x00", "\t", "%YAML 9.9", "--- a\n--- b", "{[a]: b}", "{{}: b}",
        "<<", "{<<: 1}", "{<<: [1]}", "{=: 1}",
    ]  # fmt: skip
    attacks = [f"{text}\n{keys[i % len(keys)]}: {tag}\n" for i, tag in enumerate(tags)]
    attacks += [f"{text}\n{key}: {bomb(9)}" for key in (*keys[:4], "x")]
    attacks += [f"{merges}\n{text}", bomb(9), "a: b\n" * 100_000, "", "[]", "x", "null", "1", text * 2]
    bases = ("../outside.yaml", "/dev/zero", "recipe.yaml", "'\\0'", "[1]", "{a: b}")
    attacks += [f"{text}\nbase: {base}" for base in bases]
    return [attack.encode() for attack in attacks] + [text.encode("utf-16"), b"\xff\xfe" + text.encode(), b"\0" * 1000]


def change_yaml(values: dict) -> Callable[[random.Random, bytes], bytes]:
    def change(rng: random.Random, data: bytes) -> bytes:
        if rng.random() < 0.5:
            return damage(rng, data)
        return yaml.safe_dump(json.loads(change_json(rng, json.dumps(values).encode()))).encode()

    return change


# ---- loaders and intact files --------------------------------------------------------------------------------------------


def model_targets(folder: Path, command: str) -> dict[str, Target]:
    """A model folder's two files."""
    torch.manual_seed(0)
    teacher = teachers.wrap(build("SiT", SIT), teachers.RECTIFIED_FLOW, 0.5, (1, 4, 4), 2, "index")
    teachers.save_pretrained(teacher, folder / "model", "teacher")
    config, weights = folder / "model/config.json", folder / "model/model.safetensors"
    known = json.loads(config.read_text())
    sizes = [
        {**known, "network_config": {**known["network_config"], key: value}}
        for key in SIT for value in (10**6, 10**9, 10**18) if key != "learn_sigma"
    ]  # fmt: skip
    unet = {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "label_dim": 2}
    nets = [{**known, "network": "SongUNet", "network_config": {**unet, **more}} for more in (
        {}, {"num_blocks": 10**9}, {"model_channels": 10**6}, {"channel_mult": [1] * 10_000}, {"channel_mult": [10**9]},
        {"img_resolution": 10**12}, {"attn_resolutions": list(range(10_000))},
    )]  # fmt: skip
    nets += [{**known, "network": name} for name in ("DiffusersText", "DiffusersUNet2D", "EDM2UNet", "LightningDiT", "os")]
    attacks = [json.dumps(value).encode() for value in sizes + nets] + [DEEP_JSON, b"", b"[]", b"1", b"{" * 1000]
    load = lambda: teachers.load(folder / "model")  # noqa: E731
    return {
        "config.json": Target(config, load, attacks, damage_json, 40),
        "safetensors": Target(weights, load, headers(weights.read_bytes()), damage_safetensors, 40),
    }


def checkpoint_targets(folder: Path, command: str) -> dict[str, Target]:
    """A released file of weights, the hint beside it, and an NVlabs pickle."""
    names = ("pos_embed", "x_embedder.proj.weight", "blocks.0.mlp.fc1.weight")
    native = build("SiT", {**SIT, "in_channels": 4, "input_size": 8})
    tensors = native.state_dict()
    assert all(name in tensors for name in names)
    zipped, legacy = folder / "weights.pt", folder / "legacy.pt"
    zipped.write_bytes(saved({"ema": tensors, "args": argparse.Namespace(lr=1)}))
    legacy.write_bytes(saved(tensors, _use_new_zipfile_serialization=False))
    hint = {"family": "repa", "network_config": {"num_heads": 2}, "sigma_data": 1.0}
    for path in (zipped, legacy):
        path.with_name(f"{path.name}.json").write_text(json.dumps(hint))
    pickled = folder / "network.pkl"
    pickled.write_bytes(nvlabs_pickle())
    load = lambda path: lambda: teachers.load(path)  # noqa: E731
    return {
        "torch.save": Target(zipped, load(zipped), torch_files(command, tensors), damage_early, 40),
        "torch.save of old": Target(legacy, load(legacy), pickles(command), damage_early, 30),
        "hint": Target(zipped.with_name("weights.pt.json"), load(zipped), [DEEP_JSON, b"[]", b""], damage_json, 15),
        "pickle": Target(pickled, load(pickled), pickles(command), damage_early, 40),
    }  # fmt: skip


def diffusers_targets(folder: Path, command: str) -> dict[str, Target]:
    """What pipelines of diffusers say of themselves, and the weights of one."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(**{**UNET2D, "in_channels": 1, "out_channels": 1})
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(folder / "ddpm")
    transformer = diffusers.DiTTransformer2DModel(**{**DIT, "num_layers": 1})
    diffusers.DiTPipeline(transformer, None, diffusers.DDIMScheduler()).save_pretrained(folder / "dit")
    pixart().save_pretrained(folder / "pixart")
    scheduler, index = folder / "ddpm/scheduler/scheduler_config.json", folder / "ddpm/model_index.json"
    networks = {
        "UNet2DModel": folder / "ddpm/unet",
        "DiT": folder / "dit/transformer",
        "PixArt": folder / "pixart/transformer",
    }

    def load(pipeline: str):
        return lambda: teachers.load(folder / pipeline)

    classes = (["os", "system"], ["diffusers", "os"], ["diffusers", "../x"], ["transformers", "UNet2DModel"], "x", [], None,
               ["diffusers", "__version__"], ["diffusers", "DiffusionPipeline"], ["diffusers", ["UNet2DModel"]])  # fmt: skip
    attacks = changed(index, ("unet", "scheduler"), classes) + changed(
        index, ("_class_name",), ("os.system", "x", 1, None, [])
    )
    numbers = (10**5, 10**9, 10**18, 0, -1, 1.5, "x", None, [])
    targets = {
        "pipeline": Target(index, load("ddpm"), [*attacks, DEEP_JSON, b"[]", b""], damage_json, 20),
        "scheduler": Target(scheduler, load("ddpm"), changed(scheduler, json.loads(scheduler.read_text()), numbers),
                            damage_json, 20),
    }  # fmt: skip
    for name, path in networks.items():
        config = path / "config.json"
        sizes = changed(config, json.loads(config.read_text()), numbers)
        targets[f"{name} config"] = Target(config, load(path.parent.name), [*sizes, DEEP_JSON, b""], damage_json, 20)
    (weights,) = networks["UNet2DModel"].glob("*.safetensors")
    targets["UNet2DModel"] = Target(weights, load("ddpm"), headers(weights.read_bytes()), damage_safetensors, 15)
    return targets


def changed(path: Path, keys: Iterable[str], values: Iterable) -> list[bytes]:
    """A JSON file with each of the values at each of the keys."""
    intact = json.loads(path.read_text())
    return [json.dumps({**intact, key: value}).encode() for key in keys for value in values]


class Persistent:
    """Pickles as ``torch_utils.persistence`` of NVlabs/edm pickles an object."""

    def __init__(self, class_name: str, **state):
        self.meta = dict(type="class", version=6, module_src="", class_name=class_name, state=state)

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


def persistent(part: torch.nn.Module):
    children = {key: persistent(child) for key, child in part._modules.items()}
    if isinstance(part, torch.nn.ModuleDict):
        bag = torch.nn.ModuleDict()
        bag.__dict__["_modules"] = children
        return bag
    state = dict(_parameters=dict(part._parameters), _buffers=dict(part._buffers), _modules=children)
    return Persistent(type(part).__name__, **state)


def nvlabs_pickle() -> bytes:
    """A snapshot of NVlabs/edm. Its modules need not be there to read it, but to write it."""
    own = dict(img_resolution=4, label_dim=0, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[])
    network = persistent(build("SongUNet", {**own, "in_channels": 1, "out_channels": 1}))
    arguments = {**own, "img_channels": 1, "model_type": "SongUNet"}
    ema = Persistent("EDMPrecond", _init_kwargs=arguments, _parameters={}, _buffers={}, _modules={"model": network})

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("called")

    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    for name in ("torch_utils", "torch_utils.persistence"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    data = pickle.dumps({"ema": ema}, 4)
    del sys.modules["torch_utils"], sys.modules["torch_utils.persistence"]
    return data


def run_targets(folder: Path, command: str) -> dict[str, Target]:
    """The files of a checkpoint, and cached samples of a teacher."""
    torch.manual_seed(0)
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.ones(2)).sum().backward()
    optimizer.step()
    parts = {"network": network}, {"optimizer": optimizer}
    states = ({name: part.state_dict() for name, part in kind.items()} for kind in parts)
    checkpoint = save_checkpoint(folder / "run", 1, *states, {"step": 1}, limit=1)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    names = ("../outside", "/etc/passwd", "", ".", "..", "\0", "a" * 1000)
    facts = manifest["files"]["state.json"]
    attacks = [json.dumps({"files": {**manifest["files"], name: facts}}).encode() for name in names]

    def find():
        return load_checkpoint(find_checkpoint(folder / "run", str(checkpoint), print), *parts)

    def load():
        return load_checkpoint(checkpoint, *parts)

    teacher = teachers.load(folder / "model")
    data = {"source": "teacher", "num_teacher_samples": 4, "teacher_steps": 1}
    changes = {"objective": "distillation", "network": None, "teacher": "x", "data": data}
    recipe = parse_recipe({**RECIPE, **changes}, "recipe")

    def samples():
        return teacher_samples(teacher, recipe, folder / "cache")

    samples()
    (cached,) = (folder / "cache").iterdir()
    return {
        "manifest": Target(checkpoint / "manifest.json", find, [*attacks, DEEP_JSON, b"", b"[]"], damage_json, 20),
        "state": Target(checkpoint / "state.json", load, [DEEP_JSON, b""], damage, 5),
        "optimizer": Target(checkpoint / "optimizer.pt", load, [archive(p) for p in pickles(command)], damage_early, 15),
        "samples": Target(cached, samples, headers(cached.read_bytes()), damage_safetensors, 10),
    }


def prepared_targets(folder: Path, command: str) -> dict[str, Target]:
    """The manifests and files of latents and prompts, with hashes that fit them."""
    normalization = {"name": "scm", "image_low": -1.0, "scale": [1.0] * 4, "bias": [0.0] * 4}
    facts = {"source": "x", "count": 6, "shard_size": 4}
    latents = {"normalization": normalization, "sample_shape": [4, 2, 2], "label_column": "label"}
    rows = {"mean": torch.zeros(6, 4, 2, 2), "std": torch.ones(6, 4, 2, 2), "labels": torch.arange(6)}
    prompts = {"shapes": {"encoder_hidden_states": [3, 2]}, "negative_prompt": ""}
    texts = {"encoder_hidden_states": torch.zeros(6, 3, 2)}
    write_rows(folder / "latents", LATENTS, {**facts, **latents}, rows)
    write_rows(folder / "prompts", PROMPTS, {**facts, **prompts}, texts)
    shards.add_shard(folder / "prompts", shards.read_manifest(folder / "prompts", PROMPTS), NULL,
                     {key: value[:1].clone() for key, value in texts.items()})  # fmt: skip

    def read_latents():
        data = Latents(folder / "latents")
        return [data[i] for i in (0, len(data) - 1)]

    def read_prompts():
        data = Prompts(folder / "prompts")
        return data[0 : len(data)]

    targets = {}
    for kind, read, known in (("latents", read_latents, latents), ("prompts", read_prompts, prompts)):
        path = folder / kind / "manifest.json"
        manifest = json.loads(path.read_text())
        attacks = [json.dumps({**manifest, key: value}).encode() for key in ("count", "shard_size", "shards", *known)
                   for value in (10**18, -1, 0, 1.5, "x", None, [], {})]  # fmt: skip
        targets[f"{kind} manifest"] = Target(path, read, [*attacks, DEEP_JSON], damage_json, 20)
        name = f"{kind}-00000.safetensors"
        targets[kind] = Target(folder / kind / name, hashed(read, path, name), headers((folder / kind / name).read_bytes()),
                               damage_safetensors, 15)  # fmt: skip
    return targets


def write_rows(folder: Path, kind: shards.Kind, facts: dict, tensors: dict[str, torch.Tensor]) -> None:
    manifest = shards.begin(folder, kind, facts)
    for name, rows in shards.shard_rows(kind, facts["count"], facts["shard_size"]).items():
        part = {key: value[rows.start : rows.stop].clone() for key, value in tensors.items()}
        shards.add_shard(folder, manifest, name, part)


def hashed(read: Callable, manifest: Path, name: str) -> Callable:
    """``read`` with a manifest that has the hash of whatever the file is now: who can change one can change both."""

    def load():
        intact = manifest.read_text()
        changed = json.loads(intact)
        changed["shards"][name] = shards.file_hash(manifest.parent / name)
        manifest.write_text(json.dumps(changed))
        try:
            return read()
        finally:
            manifest.write_text(intact)

    return load


def parquet_targets(folder: Path, command: str) -> dict[str, Target]:
    """A data set of images, as ``datasets`` writes it, which itself would look for the files that are named."""
    values = (np.random.default_rng(0).standard_normal((16, 4, 4)) * 64 + 128).clip(0, 255).astype(np.uint8)
    pictures, classes = [{"bytes": png(pixels), "path": None} for pixels in values], [i % 2 for i in range(16)]
    column = pa.struct({"bytes": pa.binary(), "path": pa.string()})

    def table(images=pictures, labels=classes, feature="Image", images_type=column, labels_type="int64") -> bytes:
        features = {"image": {"_type": feature}, "label": {"dtype": labels_type, "_type": "Value"}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        columns = {"image": pa.array(images, images_type), "label": pa.array(labels, labels_type)}
        file = io.BytesIO()
        parquet.write_table(pa.table(columns).replace_schema_metadata(metadata), file)
        return file.getvalue()

    def with_last(data=None, path=None) -> bytes:
        return table([*pictures[:-1], {"bytes": data, "path": path}])

    def resized(width: int, height: int) -> bytes:
        data = pictures[0]["bytes"]
        return data[:16] + struct.pack(">II", width, height) + data[24:]

    path = folder / "train.parquet"
    path.write_bytes(table())
    recipe = parse_recipe({**RECIPE, "data": {"source": str(path)}}, "recipe")
    attacks = [
        *(table(labels=classes[:-1] + [label]) for label in (10**15, -1, None)), table(labels_type="float64"),
        table(["x"] * 16, images_type=pa.string()), table(classes, images_type=pa.int64()), table(feature="Audio"),
        table(feature="os.system"), table([], []), table([*pictures[:-1], None]), with_last(), with_last(b""),
        with_last(b"?"),
        with_last(path="/etc/passwd"), with_last(path="../outside"), with_last(path="https://localhost:1/x.png"),
        with_last(resized(5, 4)), with_last(resized(12_000, 12_000)), with_last(resized(2**31 - 1, 2**31 - 1)),
        with_last(png(np.zeros((5, 4), np.uint8))), with_last(png(np.zeros((12_000, 12_000), np.uint8))), b"PAR1" * 10, b"",
    ]  # fmt: skip
    return {"parquet": Target(path, lambda: training_data(recipe, None, folder), attacks, damage, 12)}


def image_targets(folder: Path, command: str) -> dict[str, Target]:
    """An image of a folder of images, and the file that labels them."""
    images = folder / "images"
    images.mkdir()
    values = (np.random.default_rng(0).standard_normal((16, 4, 4)) * 64 + 128).clip(0, 255).astype(np.uint8)
    for i, pixels in enumerate(values):
        (images / f"{i}.png").write_bytes(png(pixels))
    rows = [{"file_name": f"{i}.png", "label": i % 2} for i in range(16)]
    metadata = images / "metadata.jsonl"
    metadata.write_text("\n".join(map(json.dumps, rows)))

    def labelled(**last) -> bytes:
        return "\n".join(map(json.dumps, [*rows[:-1], {**rows[-1], **last}])).encode()

    names = ("../outside", "/etc/passwd", "https://localhost:1/x.png", "", ".", "\0", "x" * 1000, None, 1, [], "0.png")
    attacks = [labelled(file_name=name) for name in names]
    attacks += [labelled(label=label) for label in (10**15, 10**30, -1, None, 1.5, "x", [], {"a": 1})]
    attacks += [labelled(**{key: 1}) for key in ("image", "x" * 10_000, "")] + [DEEP_JSON, b"", b"[]", b"{}", b"1\n2"]
    size = [png(np.zeros(shape, np.uint8)) for shape in ((5, 4), (12_000, 12_000))]
    large = png(values[0])[:16] + struct.pack(">II", 2**31 - 1, 2**31 - 1) + png(values[0])[24:]
    recipe = parse_recipe({**RECIPE, "data": {"source": str(images)}}, "recipe")

    def load():
        return training_data(recipe, None, folder)

    return {
        "image": Target(images / "3.png", load, [*size, large, b"", b"GIF89a", b"<svg/>", b"%!PS-Adobe"], damage, 12),
        "metadata": Target(metadata, load, attacks, damage, 10),
    }


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Picture.fromarray(pixels).save(file, "png")
    return file.getvalue()


def recipe_targets(folder: Path, command: str) -> dict[str, Target]:
    path, comparison = folder / "recipe.yaml", folder / "comparison.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    comparison.write_text(yaml.safe_dump(COMPARISON))
    attacks = recipes(command, COMPARISON, ("notes", "seeds", "models", "num_samples", "data"))
    keys = ("notes", "sample_shape", "network", "sigma_data", "base")
    return {
        "recipe": Target(path, lambda: load_recipe(path), recipes(command, RECIPE, keys), change_yaml(RECIPE), 40),
        "comparison": Target(comparison, lambda: load_comparison(comparison), attacks, change_yaml(COMPARISON), 40),
    }


# ---- trying them ---------------------------------------------------------------------------------------------------------

FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "os.fork", "socket.connect", "socket.getaddrinfo")


def watch(outside: list[Path], seen: list[str]) -> None:
    """Note what Python is asked to do that no loader should."""

    def hook(event: str, args: tuple) -> None:
        if event in FORBIDDEN:
            seen.append(f"{event} {args[:1]}")
        elif event == "open" and isinstance(args[0], str | bytes) and os.path.abspath(os.fsdecode(args[0])) in outside:
            seen.append(f"open {args[0]!r}")

    outside = {str(path) for path in outside}
    sys.addaudithook(hook)


def limit_memory() -> None:
    """To what the process takes now and 1 GiB more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def outcome(load: Callable[[], Any], seen: list[str]) -> str | None:
    """What went wrong; ``None`` if nothing did."""
    seen.clear()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # SIGPROF ends the process, whatever it is doing
    signal.setitimer(signal.ITIMER_REAL, WAIT)  # SIGALRM also one that does nothing
    try:
        load()
    except (ValueError, OSError) as error:
        text = str(error)
        if not text or "\n" in text or len(text) > 2000:
            return f"{type(error).__name__} that is not one sentence: {text[:300]!r}"
        if any(word in text for word in ("MemoryError", "allocate memory", "bad_alloc", "std::")):
            return f"asks for more memory than there is: {text[:300]}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return f"did {seen[0]}" if seen else None


def versions(target: Target, rng: random.Random, rounds: int):
    """Every version of the file: the intact one first."""
    intact = target.path.read_bytes()
    yield "intact", intact
    yield from ((f"attack {i}", data) for i, data in enumerate(target.attacks))
    yield from ((f"random {i}", target.mutate(rng, intact)) for i in range(target.random * rounds))


def main(folder: Path, rounds: int) -> None:
    marker, outside = folder / "executed", folder / "outside"
    outside.write_text("secret")
    work = folder / "work"
    work.mkdir()
    targets = {}
    kinds = (
        recipe_targets, model_targets, checkpoint_targets, diffusers_targets, run_targets, prepared_targets, parquet_targets,
        image_targets,
    )  # fmt: skip
    for make in kinds:
        targets |= make(work, f"touch {marker}")
    seen: list[str] = []
    watch([outside, work / "outside", Path("/etc/passwd")], seen)
    limit_memory()
    for number in (signal.SIGPROF, signal.SIGALRM):
        faulthandler.register(number, chain=True)  # says where it was
    tried, wrong = {}, []
    for name, target in targets.items():
        rng, intact = random.Random(name), target.path.read_bytes()
        for what, data in versions(target, rng, rounds):
            target.path.write_bytes(data)
            (folder / "progress").write_text(f"{name}, {what}")
            result = outcome(target.load, seen)
            if marker.exists():
                result = "ran a command"
                marker.unlink()
            if what == "intact":
                target.load()  # else all others would have failed for the same reason
            if result is not None:
                wrong.append(f"{name}, {what}: {result}")
            tried[name] = tried.get(name, 0) + 1
        target.path.write_bytes(intact)
    print(json.dumps({"tried": tried, "wrong": wrong}, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
