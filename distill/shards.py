"""Prepared data on the disk: a folder of numbered safetensors files, and a manifest that says which of them are whole.

The manifest is written first, with what the data depend on, and again after each file, with its hash. So at any moment
the folder holds whole files and says which; a run that was killed goes on at the first one missing.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from teachers.diffusers import read_json
from teachers.pretrained import check_target, is_size, shorten, write_atomically

MANIFEST, VERSION = "manifest.json", 1
# What a manifest says that is not an input of the data.
NOT_COMPARED = ("source", "shards")


@dataclass(frozen=True)
class Kind:
    """A kind of prepared data: its name in messages, files and commands, and which keys its manifest adds."""

    name: str
    keys: frozenset[str]

    @property
    def format(self) -> str:
        return f"scm-distill-{self.name}"

    @property
    def command(self) -> str:
        return f"distill precompute {self.name}"


def is_folder_of(kind: Kind, source: str | Path) -> bool:
    """Whether the kind's command wrote, or began to write, this folder."""
    path = Path(source) / MANIFEST
    return path.is_file() and read_json(path).get("format") == kind.format


def read_manifest(folder: Path, kind: Kind) -> dict:
    """The ``manifest.json`` of a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, of another version or of another kind.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"no {kind.name} in {folder}: it has no {MANIFEST}; {kind.command} writes it")
    manifest = read_json(path)
    if manifest.get("format") != kind.format or manifest.get("version") != VERSION:
        raise ValueError(f"{path} is not a {kind.format} version {VERSION} manifest")
    missing = {"count", "shard_size", "shards", *kind.keys} - manifest.keys()
    if missing:
        raise ValueError(f"{path} lacks the key {min(missing)!r}")
    for key in ("count", "shard_size"):
        if not is_size(manifest[key]):
            raise ValueError(f"{path}: {key} must be a whole number of at least 1, got {str(manifest[key])[:80]}")
    hashes = manifest["shards"]
    if not isinstance(hashes, dict) or not all(isinstance(digest, str) for digest in hashes.values()):
        raise ValueError(f"{path}: shards must be a mapping of files to their hashes")
    return manifest


def shard_rows(kind: Kind, count: int, shard_size: int) -> dict[str, range]:
    """The files of ``count`` rows, in order, and which rows each of them holds."""
    starts = range(0, count, shard_size)
    return {
        f"{kind.name}-{i:05d}.safetensors": range(start, min(start + shard_size, count)) for i, start in enumerate(starts)
    }


def hash_of(values) -> str:
    """Of plain JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def model_hash(model: nn.Module, facts) -> str:
    """Of a model's weights, whatever files they came in, and of plain JSON values beside them, such as its config."""
    return tensors_hash(model.state_dict(), facts)


def tensors_hash(tensors: Mapping[str, Tensor], facts) -> str:
    """Of tensors by name and of plain JSON values beside them."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # of a network that is sharded
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- writing ----------------------------------------------------------------------------------------------------------


def begin(folder: Path, kind: Kind, facts: dict) -> dict:
    """The folder's manifest: a new one with these ``facts``, or that of an earlier run with the same ones.

    Raises:
        ValueError: the folder holds data of other inputs, of another kind, or something else.
    """
    facts = {"format": kind.format, "version": VERSION, **facts}
    if not (folder / MANIFEST).is_file():
        check_target(folder, (), f"a folder of {kind.name}")
        folder.mkdir(parents=True, exist_ok=True)
        manifest = {**facts, "shards": {}}
        write_manifest(folder, manifest)
        return manifest
    manifest = read_manifest(folder, kind)
    for key in facts:
        if key not in NOT_COMPARED and manifest.get(key) != facts[key]:
            raise ValueError(
                f"{folder} holds {kind.name} with another {key} ({brief(manifest.get(key))}; asked for: "
                f"{brief(facts[key])}); give another folder"
            )
    for path in folder.glob(".*.tmp"):  # of a run that was killed while it wrote
        path.unlink()
    return manifest


def brief(value) -> str:
    return str(value["name"]) if isinstance(value, dict) and "name" in value else str(value)[:40]


def is_missing(folder: Path, manifest: dict, name: str) -> bool:
    return name not in manifest["shards"] or not (folder / name).is_file()


def add_shard(folder: Path, manifest: dict, name: str, tensors: dict[str, Tensor]) -> None:
    """Write one file, then the manifest that has its hash."""
    write_atomically(folder / name, lambda path: save_file(tensors, path))
    manifest["shards"][name] = file_hash(folder / name)
    write_manifest(folder, manifest)


def write_manifest(folder: Path, manifest: dict) -> None:
    write_atomically(folder / MANIFEST, lambda path: path.write_text(json.dumps(manifest, indent=2) + "\n"))


# ---- reading ----------------------------------------------------------------------------------------------------------


class Shards:
    """A finished folder. Every file is read once and compared with the manifest; rows are then read as they are asked for.

    Args:
        extra: files besides the numbered ones.

    Raises:
        FileNotFoundError: no such folder, or a file that its manifest lists is missing.
        ValueError: a folder that is not finished, or damaged; one sentence each.
    """

    def __init__(self, folder: str | Path, kind: Kind, extra: tuple[str, ...] = ()):
        self.folder, self.kind = Path(folder), kind
        self.manifest = read_manifest(self.folder, kind)
        self.count, self.shard_size = self.manifest["count"], self.manifest["shard_size"]
        hashes, wanted = self.manifest["shards"], -(-self.count // self.shard_size) + len(extra)
        if len(hashes) < wanted:  # before their names are written down: a manifest can ask for any number
            raise unfinished(self.folder, kind, len(hashes), wanted)
        self.names = list(shard_rows(kind, self.count, self.shard_size))
        open_shard.cache_clear()  # a file may have been replaced since it was opened
        verify(self.folder, kind, [*self.names, *extra], hashes)

    def check_rows(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise ``ValueError`` unless every file has these tensors, of a row's shape, and as many rows as it should have."""
        rows = shard_rows(self.kind, self.count, self.shard_size)
        for name in self.names:
            file = open_shard(self.folder / name)
            for key, shape in shapes.items():
                found = list(file.get_slice(key).get_shape()) if key in file.keys() else None
                if found != [len(rows[name]), *shape]:
                    raise ValueError(f"{self.folder / name}: {key} must have shape {[len(rows[name]), *shape]}, got {found}")

    def place(self, row: int):
        """The open file that holds a row, and where in its tensors that is."""
        number, place = divmod(row, self.shard_size)
        return open_shard(self.folder / self.names[number]), place


def verify(folder: Path, kind: Kind, names: list[str], hashes: dict[str, str]) -> None:
    """Read files once and compare them with the manifest; see :class:`Shards` for what is raised."""
    again = f"run the same {kind.command} again"
    done = sum(name in hashes for name in names)
    if done < len(names):
        raise unfinished(folder, kind, done, len(names))
    for name in names:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {again}")
        if file_hash(path) != hashes[name]:
            raise ValueError(
                f"{path} is not the file that its manifest describes (damaged or changed); delete it and {again}"
            )


def unfinished(folder: Path, kind: Kind, done: int, wanted: int) -> ValueError:
    return ValueError(
        f"the {kind.name} in {folder} are not finished: {done} of {wanted} files; run the same {kind.command} again, it "
        "goes on from there"
    )


@lru_cache(maxsize=256)
def open_shard(path: Path):
    """A file, mapped into memory. Each process opens its own."""
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {shorten(str(error))}") from None
