"""Checkpoints: a folder that is either whole or absent, holding everything a run needs to continue exactly.

Its manifest, which is written last, has the size and the hash of every other file, so that one which was cut off or changed
afterwards is noticed before anything is loaded.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.parallel import load_optimizer_state, load_state
from distill.shards import MANIFEST, file_hash
from teachers.checkpoints import read_container
from teachers.diffusers import read_json
from teachers.pretrained import read_safetensors

PREFIX = "checkpoint-"
STATE = "state.json"
# What else a run writes into its folder.
RUN_FILES = (
    "recipe.yaml", "metrics.jsonl", "metrics.json", "metrics.md", "curves.png", "grid.png", "samples", "student", "pipeline"
)  # fmt: skip


# What writers of the run folder name before they rename it, and the names that safetensors gives in the folders of a run.
TEMPORARY = re.compile(r"\..+\.\d+\.(tmp|old)")
TEMPORARY_TENSORS = re.compile(r"\.tmp\w{6}")


def checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints of a run, oldest first; :func:`verify` says whether one is still whole."""
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


def remove_leftovers(output_dir: Path) -> None:
    """Remove what a run that was killed while it wrote has left under temporary names."""
    found = [path for path in output_dir.glob(".*") if TEMPORARY.fullmatch(path.name) and is_ours(path.name)]
    for folder in ("samples", "student", "cache"):
        names = (output_dir / folder).glob(".*")
        found += [path for path in names if TEMPORARY.fullmatch(path.name) or TEMPORARY_TENSORS.fullmatch(path.name)]
    for path in found:
        discard(path)


def is_ours(temporary: str) -> bool:
    """Whether a temporary name stands for a checkpoint or another part of a run: the folder may hold other things."""
    name = temporary[1:].rsplit(".", 2)[0]
    return name in RUN_FILES or name.startswith(PREFIX)


def discard(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def save_checkpoint(
    output_dir: Path, step: int, modules: dict[str, dict[str, Tensor]], optimizers: dict[str, dict], state: dict, limit: int
) -> Path:  # fmt: skip
    """Write ``checkpoint-{step}`` under a temporary name, rename it, then drop the oldest beyond ``limit``. One of this step
    that is there and whole is left as it is: a run writes the same again.

    Args:
        modules, optimizers: their states in one piece, by file name.

    Raises:
        OSError: for example a full disk; what was there before is untouched and no partial folder stays.
    """
    target = output_dir / f"{PREFIX}{step}"
    if is_whole(target):
        return target
    temporary = temporary_name(target)
    try:
        temporary.mkdir(parents=True)
        for name, tensors in modules.items():
            save_file(tensors, temporary / f"{name}.safetensors")
        for name, optimizer in optimizers.items():
            with (temporary / f"{name}.pt").open("wb") as file:  # given a path, PyTorch does not say why it cannot
                torch.save(optimizer, file)
        (temporary / STATE).write_text(json.dumps(state))
        write_manifest(temporary)
        if target.exists():
            remove(target)
        os.rename(temporary, target)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        while error.__context__ is not None:  # PyTorch fails once more when it closes its file
            error = error.__context__
        raise OSError(f"checkpoint {target} could not be written ({error}); earlier checkpoints are intact") from error
    for old in checkpoints(output_dir)[:-limit]:
        remove(old)
    return target


def temporary_name(checkpoint: Path) -> Path:
    return checkpoint.with_name(f".{checkpoint.name}.{os.getpid()}.tmp")


def remove(checkpoint: Path) -> None:
    """Under another name first: killed in between, it leaves no half of a checkpoint behind."""
    old = temporary_name(checkpoint).with_suffix(".old")
    os.rename(checkpoint, old)
    shutil.rmtree(old)


def write_manifest(checkpoint: Path) -> None:
    """``manifest.json``: size and hash of every other file by its name."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": file_hash(path)} for path in sorted(checkpoint.iterdir())
    }
    (checkpoint / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n")


def verify(checkpoint: Path) -> None:
    """Read every file of a checkpoint once and compare it with the manifest.

    Raises:
        ValueError: one that is missing or another than the manifest says, or no proper manifest; one sentence.
    """
    if not (checkpoint / MANIFEST).is_file():
        raise damaged(checkpoint, f"it has no {MANIFEST}")
    try:
        files = read_json(checkpoint / MANIFEST).get("files")
    except ValueError as error:
        raise damaged(checkpoint, str(error)) from None
    if not isinstance(files, dict) or STATE not in files:
        raise damaged(checkpoint, f"its {MANIFEST} does not list its files")
    for name, facts in files.items():
        path = checkpoint / name
        if name in ("", ".", "..") or "\0" in name or path.name != name:
            raise damaged(checkpoint, f"its {MANIFEST} lists {name[:80]!r}, which is not the name of a file in it")
        if not path.is_file():
            raise damaged(checkpoint, f"it has no {name}")
        if facts != {"size": path.stat().st_size, "sha256": file_hash(path)}:
            raise damaged(checkpoint, f"{name} is not the file that its {MANIFEST} describes")


def damaged(checkpoint: Path, why: str) -> ValueError:
    return ValueError(f"checkpoint {checkpoint} is damaged: {why}")


def is_whole(checkpoint: Path) -> bool:
    try:
        verify(checkpoint)
    except (ValueError, OSError):
        return False
    return True


def find_checkpoint(output_dir: Path, resume: str, warn: Callable[[str], None]) -> Path | None:
    """The checkpoint to resume: ``"latest"``, the newest one that is whole (``None`` if there is none), or a folder.

    Args:
        warn: is told of each checkpoint that is damaged and passed over.

    Raises:
        FileNotFoundError: a folder that is not a checkpoint.
        ValueError: a folder with a damaged one.
    """
    if resume != "latest":
        path = Path(resume)
        if not any((path / name).is_file() for name in (STATE, MANIFEST)):
            have = ", ".join(str(p) for p in checkpoints(output_dir)) or "none"
            raise FileNotFoundError(f"resume_from_checkpoint {resume!r} is not a checkpoint; in this run: {have}")
        verify(path)
        return path
    for path in reversed(checkpoints(output_dir)):
        try:
            verify(path)
            return path
        except (ValueError, OSError) as error:
            warn(f"warning: {error}; it is passed over")
    return None


def load_checkpoint(path: Path, modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]) -> dict:
    """Restore modules and optimizers in place; the saved ``state`` comes back.

    Raises:
        ValueError: a file that is missing or does not fit what is trained.
    """
    for name, module in modules.items():
        file = path / f"{name}.safetensors"
        load_state(module, read_safetensors(file), str(file))
    try:
        for name, optimizer in optimizers.items():
            load_optimizer_state(optimizer, read_container(path / f"{name}.pt", mapped=False))
        return read_json(path / STATE)
    except Exception as error:  # optimizers raise many kinds
        reason = " ".join(str(error).split())[:500]
        raise ValueError(f"checkpoint {path} cannot be resumed ({reason}); is it of this recipe?") from error
