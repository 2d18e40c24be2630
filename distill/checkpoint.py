"""Checkpoints: a folder that is either whole or absent, holding everything a run needs to continue exactly."""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.parallel import load_optimizer_state, load_state
from teachers.pretrained import read_safetensors

PREFIX = "checkpoint-"
# What else a run writes into its folder.
RUN_FILES = (
    "recipe.yaml", "metrics.jsonl", "metrics.json", "metrics.md", "curves.png", "grid.png", "samples", "student", "pipeline"
)  # fmt: skip


def checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = [p for p in output_dir.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def set_aside(output_dir: Path, resumed: Path | None) -> Path | None:
    """Move what an earlier run left in ``output_dir`` and the new one would overwrite into ``output_dir/earlier-N``.

    Args:
        resumed: the checkpoint of ``output_dir`` that the new run goes on from; then only later ones are moved.

    Returns:
        The folder, or ``None`` if there was nothing to move.
    """
    stale = checkpoints(output_dir)
    if resumed is not None and resumed.resolve().parent == output_dir.resolve():
        stale = [path for path in stale if step_of(path) > step_of(resumed)]
    elif stale or (output_dir / "student").exists():
        stale += [output_dir / name for name in RUN_FILES if (output_dir / name).exists()]
    if not stale:
        return None
    number = 1 + sum(1 for _ in output_dir.glob("earlier-*"))
    folder = output_dir / f"earlier-{number}"
    folder.mkdir()
    for path in stale:
        os.rename(path, folder / path.name)
    return folder


def save_checkpoint(
    output_dir: Path, step: int, modules: dict[str, dict[str, Tensor]], optimizers: dict[str, dict], state: dict, limit: int
) -> Path:  # fmt: skip
    """Write ``checkpoint-{step}`` under a temporary name, rename it, then drop the oldest beyond ``limit``.

    Args:
        modules, optimizers: their states in one piece, by file name.

    Raises:
        OSError: for example a full disk; what was there before is untouched and no partial folder stays.
    """
    target = output_dir / f"{PREFIX}{step}"
    temporary = output_dir / f".{PREFIX}{step}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        for name, tensors in modules.items():
            save_file(tensors, temporary / f"{name}.safetensors")
        for name, optimizer in optimizers.items():
            torch.save(optimizer, temporary / f"{name}.pt")
        (temporary / "state.json").write_text(json.dumps(state))
        if target.exists():
            shutil.rmtree(target)
        os.rename(temporary, target)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"checkpoint {target} could not be written ({error}); earlier checkpoints are intact") from error
    for old in checkpoints(output_dir)[:-limit]:
        shutil.rmtree(old)
    return target


def find_checkpoint(output_dir: Path, resume: str) -> Path | None:
    """The checkpoint to resume: ``"latest"`` (``None`` if there is none yet) or a folder.

    Raises:
        FileNotFoundError: a folder that is not a checkpoint.
    """
    if resume == "latest":
        return next(reversed(checkpoints(output_dir)), None)
    if not (Path(resume) / "state.json").is_file():
        have = ", ".join(str(p) for p in checkpoints(output_dir)) or "none"
        raise FileNotFoundError(f"resume_from_checkpoint {resume!r} is not a checkpoint; in this run: {have}")
    return Path(resume)


def load_checkpoint(path: Path, modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]) -> dict:
    """Restore modules and optimizers in place; the saved ``state`` comes back.

    Raises:
        ValueError: a file that is missing, broken, or does not fit.
    """
    for name, module in modules.items():
        file = path / f"{name}.safetensors"
        load_state(module, read_safetensors(file), str(file))
    try:
        for name, optimizer in optimizers.items():
            load_optimizer_state(optimizer, torch.load(path / f"{name}.pt", weights_only=True))
        return json.loads((path / "state.json").read_text())
    except Exception as error:
        raise ValueError(f"checkpoint {path} is damaged ({error}); delete it to resume from an earlier one") from error
