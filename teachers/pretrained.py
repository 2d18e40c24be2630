"""Loading and saving: bundled models, model folders, run folders and exported pipelines; safetensors only."""

import difflib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from teachers.base import Teacher
from teachers.networks import build
from teachers.parameterization import Parameterization

ZOO = Path(__file__).parent / "zoo"
FORMAT, VERSION = "scm-distill", 1
WEIGHTS = "model.safetensors"
PIPELINE_WEIGHTS = "diffusion_pytorch_model.safetensors"


def bundled() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(path.parent.name for path in ZOO.glob("*/config.json"))


def resolve(source: str | Path) -> Path:
    """The model folder behind a bundled name, a model folder, a run folder or an exported pipeline.

    Raises:
        FileNotFoundError: no such name or folder (with the nearest bundled name).
        ValueError: a folder or file that holds no model.
    """
    if str(source) in bundled():
        return ZOO / str(source)
    path = Path(source)
    if not path.exists():
        near = difflib.get_close_matches(str(source), bundled(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"bundled models: {', '.join(bundled())}"
        raise FileNotFoundError(f"no model {str(source)!r}: neither a bundled name nor a path; {hint}")
    for folder in (path, path / "student", path / "network"):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(f"{path} is not a model: expected a folder with config.json, a run folder or an exported pipeline")


def load_config(source: str | Path) -> dict:
    """The checked ``config.json`` of a model; see :func:`save_pretrained` for its keys."""
    path = resolve(source) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT or config.get("version") != VERSION:
        raise ValueError(f"{path} is not a {FORMAT} version {VERSION} model config")
    for key in ("role", "network", "network_config", "parameterization", "sigma_data", "sample_shape"):
        if key not in config:
            raise ValueError(f"{path} lacks the key {key!r}")
    return config


def load(source: str | Path | Teacher, device: str | torch.device = "cpu") -> Teacher:
    """A pretrained teacher or student as a TrigFlow network, in eval mode.

    Args:
        source: a bundled name, a model folder, a run folder (its student), an exported pipeline, or a ``Teacher``,
            which is returned as it is.

    Raises:
        FileNotFoundError: nothing by that name.
        ValueError: a config or weights that are broken or do not fit together; one sentence each.
    """
    if isinstance(source, Teacher):
        return source
    config = load_config(source)
    native = build(config["network"], config["network_config"])
    load_weights(native, resolve(source))
    return teacher_from_config(native, config, str(source)).to(device).eval()


def teacher_from_config(native: nn.Module, config: dict, source: str | None = None) -> Teacher:
    return Teacher(
        native,
        Parameterization(**config["parameterization"]),
        sigma_data=config["sigma_data"],
        sample_shape=tuple(config["sample_shape"]),
        num_classes=config.get("num_classes"),
        label_format=config.get("label_format", "index"),
        source=source,
    )


def load_weights(native: nn.Module, folder: Path) -> None:
    if (folder / WEIGHTS).is_file():
        path, prefix = folder / WEIGHTS, ""
    elif (folder / PIPELINE_WEIGHTS).is_file():
        path, prefix = folder / PIPELINE_WEIGHTS, "model.native."
    else:
        raise FileNotFoundError(f"{folder} has a config.json but no {WEIGHTS}")
    tensors = read_safetensors(path)
    load_tensors(native, {key.removeprefix(prefix): value for key, value in tensors.items()}, str(path))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file; a broken file is a ``ValueError`` of one sentence."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file (truncated or corrupt): {error}") from None


def load_tensors(network: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Strict ``load_state_dict`` whose errors are one sentence."""
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
    network.load_state_dict(tensors)


def save_pretrained(model: Teacher, folder: str | Path, role: str, **extra) -> None:
    """Write a model folder: ``config.json`` and ``model.safetensors`` with the native fp32 weights, each atomically.

    Args:
        role: ``"teacher"`` or ``"student"``.
        extra: further plain values for ``config.json``: ``sampling`` (times by number of steps), ``guidance_scale``
            (baked in), ``guidance_range``, ``teacher``, ``training``.

    Raises:
        ValueError: for a network that is not one of ours and could not be rebuilt from a config.
    """
    config = model_config(model, role, **extra)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.native.state_dict().items()}
    write_atomically(folder / WEIGHTS, lambda path: save_file(tensors, path))
    write_atomically(folder / "config.json", lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))


def model_config(model: Teacher, role: str, **extra) -> dict:
    """The ``config.json`` of a model; see :func:`save_pretrained`."""
    if not hasattr(model.native, "config"):
        raise ValueError(f"{type(model.native).__name__} is not a registered network; keep its state_dict yourself")
    facts = {"format": FORMAT, "version": VERSION, "role": role, "network": type(model.native).__name__}
    return {**facts, "network_config": model.native.config, **model.metadata(), **extra}


def write_atomically(path: Path, write) -> None:
    """``write(temporary_path)``, then rename over ``path``: a reader sees the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.chmod(0o644)  # safetensors writes files that only their owner can read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def inspect(source: str | Path) -> dict:
    """What ``distill teachers inspect`` prints: plain facts about a model."""
    model, config, folder = load(source), load_config(source), resolve(source)
    return {
        "source": str(source),
        "role": config["role"],
        "network": config["network"],
        "parameters": sum(p.numel() for p in model.native.parameters()),
        "bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
        "sample_shape": list(model.sample_shape),
        "num_classes": model.num_classes,
        "sigma_data": model.sigma_data,
        "parameterization": model.parameterization.to_dict(),
        "time_embedding_speed": time_embedding_speed(model),
    }


def time_embedding_speed(model: Teacher, num_times: int = 500) -> float:
    """How fast the time embedding turns: max over t of ``rms(cos t sin t d emb/dt) / rms(emb)``.

    About 0.1 for TrigFlow, EDM's DDPM++ and SiT; above 1 a student needs a smoother embedding (sCM, section 4.1).
    """
    native = model.native
    embedding = native.map_noise if hasattr(native, "map_noise") else native.t_embedder.frequencies
    ends = torch.tensor([0.002, 80.0], dtype=torch.float64) / model.sigma_data
    t = torch.linspace(*torch.atan(ends).tolist(), num_times, dtype=torch.float64)

    def embed(time: Tensor) -> Tensor:
        return embedding(model.parameterization.coefficients(time, model.sigma_data).time)

    emb, speed = torch.func.jvp(embed, (t,), (t.cos() * t.sin(),))
    return (speed.square().mean(1) / emb.square().mean(1)).sqrt().max().item()
