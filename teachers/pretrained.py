"""Loading and saving: bundled models, model folders, run folders and exported pipelines, on disk or on the Hugging Face hub;
safetensors only.
"""

import difflib
import json
import math
import os
import re
from collections.abc import Callable, Collection
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from teachers import hub
from teachers.base import LABEL_FORMATS, Teacher
from teachers.checkpoints import is_checkpoint, read_checkpoint
from teachers.diffusers import DESCRIPTIONS, is_diffusers_folder, network_folder, read_diffusers, read_json, read_json_value
from teachers.networks import NETWORKS, OURS, build, is_number, is_ours, is_registered
from teachers.networks.trigflow_time import time_embeddings
from teachers.nvlabs import is_nvlabs_pickle, read_nvlabs
from teachers.parameterization import Parameterization
from teachers.unfilled import Unfilled

ZOO = Path(__file__).parent / "zoo"
FORMAT, VERSION = "scm-distill", 1
WEIGHTS = "model.safetensors"
PIPELINE_WEIGHTS = "diffusion_pytorch_model.safetensors"
# What other projects write, recognised by content: kind -> (is this one, its config and tensors).
READERS: dict[str, tuple[Callable[[Path], bool], Callable[[Path], tuple[dict, dict[str, Tensor]]]]] = {
    "NVlabs pickle": (is_nvlabs_pickle, read_nvlabs),
    "checkpoint": (is_checkpoint, read_checkpoint),
    "diffusers pipeline": (is_diffusers_folder, read_diffusers),
}
ROLES = ("teacher", "student")
TOLERABLE_SPEED = 1.0  # of a time embedding that a student is differentiated through
PIPELINE_PREFIX = "model.native."  # where distill.pipeline.SCMNetwork keeps the native network


def bundled() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(path.parent.name for path in ZOO.glob("*/config.json"))


def resolve(source: str | Path) -> Path:
    """The model folder behind a bundled name, a model folder (or a file in it), a run folder or an exported pipeline; or
    the file itself, for an NVlabs pickle or a released checkpoint. ``hf://owner/name[@revision][/path]`` is any of them on
    the Hugging Face hub and is downloaded (:mod:`teachers.hub`).

    A bundled name wins over a folder of the same name; write ``./name`` for the folder.

    Raises:
        FileNotFoundError: no such name, folder or place on the hub (with the nearest bundled name).
        ValueError: a folder or file that holds no model.
    """
    return locate(source)[1]


def locate(source: str | Path) -> tuple[str, Path]:
    """What kind of thing ``source`` is, in words, and its model folder; see :func:`resolve`."""
    if not isinstance(source, (str, Path)):
        raise TypeError(
            f"a model is given by a name, a path or a teachers.Teacher, got {type(source).__name__}; teachers.wrap makes a "
            "Teacher of any nn.Module"
        )
    if str(source) in bundled():
        return "bundled model", ZOO / str(source)
    path = download(str(source)) if hub.is_hub(source) else Path(source)
    if not path.exists():
        raise FileNotFoundError(f"no model {str(source)!r}: neither a bundled name nor a path; {suggestion(str(source))}")
    if path.name in (WEIGHTS, PIPELINE_WEIGHTS, "config.json") and (path.parent / "config.json").is_file():
        path = path.parent
    for kind, (matches, _) in READERS.items():
        if matches(path):
            return kind, path
    kinds = {"model folder": path, "run folder": path / "student", "exported pipeline": path / "network"}
    for kind, folder in kinds.items():
        if (folder / "config.json").is_file():
            return kind, folder
    raise ValueError(
        f"{path} is not a model: expected a folder with config.json, a finished run (student/), an exported pipeline, a "
        f"pipeline of diffusers, an NVlabs pickle or a checkpoint by torch.save or as safetensors{part_of_pipeline(path)}"
    )


def part_of_pipeline(path: Path) -> str:
    """A clause that says what to name in place of a part of a pipeline of diffusers; empty for anything else."""
    if is_diffusers_folder(path.parent):
        return f"; it is a part of a pipeline: name its folder {path.parent}, whose scheduler says what the network means"
    config = path / "config.json"
    if config.is_file() and "_class_name" in read_json(config):
        return "; it is a part of a pipeline: name the pipeline's folder, whose scheduler says what the network means"
    return ""


def suggestion(name: str) -> str:
    """What may have been meant by a name that is not there."""
    near = difflib.get_close_matches(name.lower(), bundled(), n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    on_hub = f"; on the Hugging Face hub it would be hf://{name}" if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else ""
    return f"bundled models: {', '.join(bundled())}{on_hub}"


@lru_cache  # one process sees one snapshot
def download(source: str) -> Path:
    """The local copy of a model on the hub. Configs come first: they say whether there are weights to fetch, and which.

    Raises:
        ValueError, OSError: as :func:`teachers.hub.fetch`; or it is not a model that can be read.
    """
    path = hub.fetch(source, [*DESCRIPTIONS, f"network/{hub.CONFIG}", f"student/{hub.CONFIG}"])
    if path.is_file():
        return path
    kind, folder = locate(path)
    if kind == "diffusers pipeline":
        hub.fetch_model(source, network_folder(path).relative_to(path).as_posix())
        return path
    load_config(path)
    hub.fetch(source, [(folder.relative_to(path) / name).as_posix() for name in (WEIGHTS, PIPELINE_WEIGHTS)])
    return path


def load_config(source: str | Path) -> dict:
    """The checked ``config.json`` of a model, or what a single file says in its place; :func:`save_pretrained` has its keys.

    Raises:
        FileNotFoundError, ValueError: as :func:`resolve`, and for a config that is malformed or of another format.
    """
    kind, path = locate(source)
    if kind in READERS:
        return read_file(kind, path)[0]
    path = path / "config.json"
    config = read_json_value(path)
    if not isinstance(config, dict) or config.get("format") != FORMAT or config.get("version") != VERSION:
        part = part_of_pipeline(path.parent) if isinstance(config, dict) else ""
        raise ValueError(f"{path} is not a {FORMAT} version {VERSION} model config{part}")
    check_config(config, path)
    # diffusers writes every optional key of an exported network, as null where it is unset.
    return {key: value for key, value in config.items() if value is not None or key == "num_classes"}


def read_file(kind: str, path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Checked config and tensors of a single file."""
    config, tensors = READERS[kind][1](path)
    check_config(config, path)
    return {"format": FORMAT, "version": VERSION, **config}, tensors


def check_config(config: dict, path: Path) -> None:
    """Raise ``ValueError`` for a key that is missing or has a value of the wrong kind."""
    for key, (wanted, valid) in CONFIG_KEYS.items():
        if key not in config:
            raise ValueError(f"{path} lacks the key {key!r}")
        if not valid(config[key]):
            raise ValueError(f"{path}: {key} must be {wanted}, got {shorten(repr(config[key]))}")


def shorten(text: str) -> str:
    """What a file says, in an error message, which it must not fill."""
    return text if len(text) <= 500 else f"{text[:500]} ..."


def is_size(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


# What every config must hold: key -> (in words, the test).
CONFIG_KEYS: dict[str, tuple[str, Callable]] = {
    "role": ("teacher or student", lambda v: v in ROLES),
    "network": ("a name", lambda v: isinstance(v, str)),
    "network_config": ("a mapping", lambda v: isinstance(v, dict)),
    "parameterization": ("a mapping", lambda v: isinstance(v, dict)),
    "sigma_data": ("a positive number", lambda v: is_number(v) and 0 < v < math.inf),
    "sample_shape": ("a list of sizes", lambda v: isinstance(v, list) and len(v) in (3, 4) and all(map(is_size, v))),
    "num_classes": ("a number of classes or null", lambda v: v is None or is_size(v)),
    "label_format": (f"one of {', '.join(LABEL_FORMATS)}", lambda v: isinstance(v, str) and v in LABEL_FORMATS),
}


def load(source: str | Path | Teacher, device: str | torch.device = "cpu") -> Teacher:
    """A pretrained teacher or student as a TrigFlow network in fp32, in eval mode; trainable as it was built.

    Args:
        source: a bundled name, a model folder, a run folder (its student), an exported pipeline, a pipeline of diffusers,
            an NVlabs pickle, a released checkpoint (:mod:`teachers.checkpoints`), one of these on the Hugging Face hub
            (``hf://owner/name``), or a ``Teacher``, which is returned as it is.

    Raises:
        FileNotFoundError: nothing by that name.
        TypeError: neither a name, a path nor a ``Teacher``.
        ValueError: a config or weights that are broken or do not fit together; one sentence each.
    """
    if isinstance(source, Teacher):
        return source
    config, tensors, where = read_model(source)
    model = from_config(config, source, sum(map(Tensor.numel, tensors.values())))
    check_tensors(model.native, tensors, where)
    model.native.load_state_dict(tensors)
    return model.to(device).eval()


def outline(source: str | Path) -> Teacher:
    """As :func:`load`, but on the meta device: shapes without weights, from ``config.json`` alone where there is one. A
    user's own network is built as it is.

    Raises:
        FileNotFoundError, ValueError: as :func:`load`.
    """
    return outline_of(load_config(source), source)


def outline_of(config: dict, source: str | Path) -> Teacher:
    """:func:`outline` of a model that has this ``config.json``."""
    with torch.device("meta" if NETWORKS.get(config["network"]) in OURS else "cpu"):
        return from_config(config, source, size=2**40).eval()  # which takes no memory there


def from_config(config: dict, source: str | Path, size: int) -> Teacher:
    """The network that a checked ``config.json`` describes, with no weights filled in.

    Args:
        size: as :func:`build_unfilled`.
    """
    try:
        native = build_unfilled(config["network"], config["network_config"], size)
        convention = Parameterization(**config["parameterization"])
    except (TypeError, ValueError) as error:
        holder = resolve(source)
        raise ValueError(f"{holder / 'config.json' if holder.is_dir() else holder}: {shorten(str(error))}") from error
    return Teacher(
        native, convention, config["sigma_data"], config["sample_shape"], config["num_classes"],
        config["label_format"], source=str(source), latents=config.get("latents"),
    )  # fmt: skip


def build_unfilled(name: str, config: dict, size: int) -> nn.Module:
    """A network whose weights are still to come: no time and no random numbers are spent on them, but it has the tables that
    no file holds (positions, in networks of diffusers). A user's own may do anything, and is built as it is.

    Raises:
        ValueError: a config that does not fit the network, or one of a network far larger than the ``size`` values that are
            there for it: that may take all memory, or have no end.
    """
    if name in NETWORKS and NETWORKS[name] not in OURS:
        return build(name, config)
    with Unfilled(size):
        return build(name, config)


def read_model(source: str | Path) -> tuple[dict, dict[str, Tensor], str]:
    """Config and tensors of the native network, and the file that holds the tensors."""
    kind, path = locate(source)
    if kind in READERS:
        return *read_file(kind, path), str(path)
    config = load_config(source)
    weights = path / (PIPELINE_WEIGHTS if (path / PIPELINE_WEIGHTS).is_file() else WEIGHTS)
    if not weights.is_file():
        raise FileNotFoundError(f"{path} has a config.json but no {WEIGHTS}")
    tensors = read_safetensors(weights)
    if weights.name == PIPELINE_WEIGHTS:
        tensors = {key.removeprefix(PIPELINE_PREFIX): value for key, value in tensors.items()}
    return config, tensors, str(weights)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file; a broken file is a ``ValueError`` of one sentence."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file (truncated or corrupt): {shorten(str(error))}"
        ) from None


def load_tensors(network: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Strict ``load_state_dict`` whose errors are one sentence."""
    check_tensors(network, tensors, where)
    network.load_state_dict(tensors)


def check_tensors(network: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Raise ``ValueError`` unless ``tensors`` are exactly the network's, by name and shape."""
    expected = network.state_dict()
    problems = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - expected.keys()),
        "wrongly shaped": sorted(
            k for k in expected.keys() & tensors.keys() if expected[k].shape != tensors[k].shape
        ),
    }
    found = [f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
             for kind, keys in problems.items() if keys]  # fmt: skip
    if found:
        raise ValueError(f"{where} does not fit {type(network).__name__}: tensors {'; '.join(found)}")


def check_target(folder: Path, replaceable: Collection[str], what: str) -> None:
    """Raise ``ValueError`` unless ``folder`` is absent, or holds nothing but what may be written over."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose another folder")
    foreign = sorted(set(os.listdir(folder)) - set(replaceable)) if folder.exists() else []
    if foreign:
        raise ValueError(f"{folder} is not empty and not {what}: it holds {foreign[0]}; choose another folder")


def check_model_target(folder: Path) -> None:
    """Raise ``ValueError`` unless ``folder`` is absent, empty, or a model folder of ours and nothing else."""
    config = folder / "config.json"
    ours = config.is_file() and read_json(config).get("format") == FORMAT
    check_target(folder, ("config.json", WEIGHTS) if ours else (), "a model folder")


def save_pretrained(model: Teacher, folder: str | Path, role: str, **extra) -> None:
    """Write a model folder: ``config.json`` and ``model.safetensors`` with the native fp32 weights, each atomically.

    Args:
        role: ``"teacher"`` or ``"student"``.
        extra: further plain values for ``config.json``: ``sampling`` (times by number of steps), ``guidance_scale``
            (baked in), ``guidance_range``, ``teacher``, ``training``, ``metrics`` (rows of a table).

    Raises:
        ValueError: for a network that is not registered and could not be rebuilt from a config.
        OSError: for example a full disk; a model that was there before stays whole.
    """
    write_model(Path(folder), model, model_config(model, role, **extra))


def write_model(folder: Path, model: Teacher, config: dict) -> None:
    """A model folder from a model and its whole ``config.json``."""
    write_weights(folder, model)
    write_config(folder, config)


def write_config(folder: Path, config: dict) -> None:
    write_atomically(folder / "config.json", lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))


def write_weights(folder: Path, model: Teacher) -> None:
    """The native network's weights in fp32, under the names of its own state dict."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().float().contiguous() for key, value in model.native.state_dict().items()}
    write_atomically(folder / WEIGHTS, lambda path: save_file(tensors, path))


def model_config(model: Teacher, role: str, **extra) -> dict:
    """The ``config.json`` of a model; see :func:`save_pretrained`."""
    check_registered(model.native)
    if role not in ROLES:
        raise ValueError(f"role is {role!r}; allowed: {', '.join(ROLES)}")
    facts = {"format": FORMAT, "version": VERSION, "role": role, "network": type(model.native).__name__}
    return {**facts, "network_config": model.native.config, **model.metadata(), **extra}


def check_registered(native: nn.Module) -> None:
    """Raise ``ValueError`` for a network that cannot be built again, with what is to be done."""
    if is_registered(native):
        return
    name = type(native).__name__
    if is_ours(native):
        raise ValueError(f"{name} was not made by teachers.networks.build and cannot be saved as a model folder or exported")
    raise ValueError(
        f"{name} is not registered and cannot be saved as a model folder or exported: decorate its class with "
        "@teachers.register, then make the network"
    )


def write_atomically(path: Path, write) -> None:
    """``write(temporary_path)``, then rename over ``path``: a reader sees the old file or the new one, whole.

    Raises:
        OSError: it could not be written; ``path`` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.chmod(0o644)  # safetensors writes files that only their owner can read
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error  # the rest of the message is the temporary file's name
        raise OSError(f"{path} could not be written: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)


def inspect(source: str | Path) -> dict:
    """What ``distill teachers inspect`` prints: plain facts about a model."""
    model, config, (kind, path) = load(source), load_config(source), locate(source)
    files = [path] if path.is_file() else path.rglob("*.safetensors")
    return {
        "source": str(source),
        "kind": kind,
        "role": config["role"],
        "network": config["network"],
        "parameters": sum(p.numel() for p in model.native.parameters()),
        "bytes": sum(f.stat().st_size for f in files),
        "sample_shape": list(model.sample_shape),
        "num_classes": model.num_classes,
        "sigma_data": model.sigma_data,
        "parameterization": model.parameterization.to_dict(),
        "time_embedding_speed": (speed := time_embedding_speed(model)),
        "student": student_needs(speed) if config["role"] == "teacher" else "is one",
    }


def student_needs(speed: float | None) -> str:
    """What a student of a network whose time embedding turns at this speed needs (sCM, section 4.1)."""
    if speed is None:
        return "cannot be told in advance: the time embedding is none of ours"
    if speed > TOLERABLE_SPEED:
        return f"needs a smoother time embedding (speed {TOLERABLE_SPEED:g} at most): objective retrofit"
    return "can start from this network as it is"


def time_embedding_speed(model: Teacher, num_times: int = 500) -> float | None:
    """How fast the time embedding turns: max over t of ``rms(cos t sin t d emb/dt) / rms(emb)``.

    About 0.1 for TrigFlow, EDM's DDPM++ and SiT; above 1 a student needs a smoother embedding (sCM, section 4.1).
    ``None`` for a network whose time embedding is none of ours.
    """
    embedding = next(iter(time_embeddings(model.native).values()), None)
    if embedding is None:
        return None
    ends = torch.tensor([0.002, 80.0], dtype=torch.float64) / model.sigma_data
    t = torch.linspace(*torch.atan(ends).tolist(), num_times, dtype=torch.float64)

    def embed(time: Tensor) -> Tensor:
        return embedding(model.parameterization.coefficients(time, model.sigma_data).time)

    emb, speed = torch.func.jvp(embed, (t,), (t.cos() * t.sin(),))
    return (speed.square().mean(1) / emb.square().mean(1)).sqrt().max().item()
