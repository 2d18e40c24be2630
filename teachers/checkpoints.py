"""Teachers from a single file of weights, as released: what ``torch.save`` writes, or safetensors.

Such a file holds tensors and their names. The names and shapes say which network they belong to and with which
arguments it was built; what they cannot say is read from ``<file name>.json`` beside it (:func:`read_hint`).
"""

import argparse
import io
import math
import mmap
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from teachers import dit, openai
from teachers.diffusers import read_json_value
from teachers.inert_pickle import check_tuples
from teachers.networks import is_number

ZIP = b"PK\x03\x04"
# torch.save before 1.6 began with this number as a pickle of protocol 2.
LEGACY = b"\x80\x02" + pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)[2:]
LEGACY_PICKLES = 5  # of which it consists: number, version, system, the object, names of the storages; then their bytes
MAX_HEADER = 100_000_000  # bytes, of a safetensors file
# Beyond what a file holds: values of expanded tensors, unpacked bytes; and how much smaller weights get when packed.
MAX_EXPANDED, MAX_COMPRESSION = 2**26, 20
AVERAGED = ("ema", "ema_model", "model_ema", "state_dict_ema")
CURRENT = ("model", "state_dict")
HINTS = {"family", "sigma_data", "network_config"}


class Family(NamedTuple):
    """Networks that were released under the same tensor names.

    ``matches`` looks at all tensors of a file. ``config`` gives the whole ``config.json`` as a value (see
    :func:`teachers.save_pretrained`), with ``None`` for an argument in ``network_config`` that the tensors do not tell.
    ``own`` gives the tensors of our network.
    """

    name: str
    matches: Callable[[dict[str, Tensor]], bool]
    config: Callable[[dict[str, Tensor]], dict]
    own: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict


FAMILIES = (
    Family("sit", dit.is_sit, dit.sit_config),
    Family("dit", dit.is_sit, dit.dit_config),
    Family("repa", dit.is_repa, dit.repa_config, dit.repa_tensors),
    Family("lightning-dit", dit.is_lightning_dit, dit.lightning_dit_config),
    Family("openai", openai.matches, openai.config),
)


def is_checkpoint(path: Path) -> bool:
    """Whether this is a file by ``torch.save`` or a safetensors file, by content."""
    return path.is_file() and container(path) is not None


def container(path: Path) -> str | None:
    """``"zip"`` or ``"legacy"`` of ``torch.save``, ``"safetensors"``, or ``None``."""
    with path.open("rb") as file:
        head = file.read(len(LEGACY))
    if head.startswith(ZIP):
        return "zip"
    if head == LEGACY:
        return "legacy"
    is_safetensors = head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER
    return "safetensors" if is_safetensors else None


def read_checkpoint(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """``config.json`` as a value, and the fp32 tensors of the averaged network, in a released file of weights.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, one that asks for more than tensors, or a network that is not known or not told
            apart from another; one sentence.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    tensors = plain_names(state_dict(read_container(path), path), path)
    check_stored(tensors, path)
    hint = read_hint(path)
    try:
        family = choose_family(tensors, hint.get("family"), path)
    except (LookupError, TypeError) as error:
        raise ValueError(f"{path} has tensors of other shapes than any network that is known: {error}") from None
    if family.name == "openai" and "family" not in hint and openai.is_consistency_model(path.name):
        raise ValueError(
            f"{path} is by its name one of OpenAI's consistency models: it is distilled already and has no PF-ODE to learn "
            f'from; if it is an EDM teacher all the same, write {{"family": "openai"}} into {hint_path(path)}'
        )
    try:
        tensors = family.own(tensors)
        config = family.config(tensors)
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{path} has the tensor names of {family.name} but cannot be read as such: {error}") from None
    config = {**config, **{key: value for key, value in hint.items() if key == "sigma_data"}}
    config["network_config"] = {**config["network_config"], **hint.get("network_config", {})}
    unknown = [key for key, value in config["network_config"].items() if value is None]
    if unknown:
        example = f'{{"network_config": {{"{unknown[0]}": ...}}}}'
        raise ValueError(f"{path} does not tell {', '.join(unknown)}: write {example} into {hint_path(path)}")
    return config, {key: value.detach().float() for key, value in tensors.items()}


def read_container(path: Path, mapped: bool = True) -> Any:
    """The object in the file; nothing that it names is called, but for inert containers.

    Args:
        mapped: leave the tensors in the file where that can be done, until they are looked at.
    """
    kind = container(path)
    if kind is None:
        raise ValueError(f"{path} was written neither by torch.save nor as safetensors")
    try:
        if kind == "safetensors":
            return load_file(path)
        check_pickle(path)
        # Training scripts keep their options beside the weights. A Namespace is a bag of values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            mapped = mapped and kind == "zip" and is_uncompressed(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} {refusal(str(error))}") from None
    except Exception as error:  # torch.load has no error of its own for damaged files
        kind = "safetensors" if kind == "safetensors" else "torch.save"
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} is not a readable {kind} file (truncated or corrupt): {reason}") from None


def check_pickle(source: Path | bytes) -> None:
    """Raise ``ValueError`` for a file by ``torch.save`` that would keep PyTorch busy for ever or take all memory, although
    it calls nothing; and for one that is malformed.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        if file.read(len(ZIP)) == ZIP:
            check_archive(file)
        elif isinstance(source, bytes):
            check_old(io.BytesIO(source))
        else:  # a file takes memory for as many bytes as it is asked for, there or not
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                check_old(mapped)


def check_archive(file: BinaryIO) -> None:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        stored, unpacked = (sum(getattr(entry, size) for entry in entries) for size in ("compress_size", "file_size"))
        if unpacked > MAX_COMPRESSION * stored + MAX_EXPANDED:
            raise ValueError(f"its {stored:,} bytes unpack to {unpacked:,}")
        for entry in entries:
            if entry.filename.endswith("data.pkl"):
                with archive.open(entry) as pickled:
                    check_tuples(pickled)


def check_old(file: BinaryIO | mmap.mmap) -> None:
    """Of PyTorch before 1.6."""
    for _ in range(LEGACY_PICKLES):
        check_tuples(file)


def is_uncompressed(path: Path) -> bool:
    """Whether the tensors can be mapped into memory. ``torch.load`` would map compressed ones as they are."""
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def refusal(message: str) -> str:
    """PyTorch's paragraphs on a pickle that it does not read, as one clause."""
    asked = re.search(r"GLOBAL (\S+)", message)
    if asked:
        return f"asks for the global {asked[1]}, which weights do not need; save its dictionary of tensors alone"
    parts = [" ".join(part.split()) for part in re.split(r"\n\n|WeightsUnpickler error:", message)]
    reason = [part for part in parts if part and not part.startswith("Check the documentation")][-1:]
    return f"is not a readable torch.save file: {''.join(reason)[:200]}"


def state_dict(value: Any, path: Path) -> dict[str, Tensor]:
    """The averaged weights if there are any, else the weights."""
    if is_state_dict(value):
        return value
    entries = value if isinstance(value, dict) else {}
    found = [key for key in (*AVERAGED, *CURRENT) if entries.get(key) is not None]
    if not found:
        wanted = ", ".join((*AVERAGED, *CURRENT))
        raise ValueError(f"{path} holds no dictionary of tensors, neither itself nor under {wanted}")
    if not is_state_dict(entries[found[0]]):
        raise ValueError(f"{path}: its entry {found[0]!r} is not a dictionary of tensors")
    return entries[found[0]]


def is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(key, str) and torch.is_tensor(tensor) for key, tensor in value.items())
    )


def check_stored(tensors: dict[str, Tensor], path: Path) -> None:
    """Raise ``ValueError`` for tensors that are not plain arrays in memory, or far larger than what the file holds of them:
    a single number can be a tensor of any size.
    """
    for key, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu" or tensor.is_complex():
            raise ValueError(f"{path}: its tensor {key} is not a plain array of real numbers")
    stored = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    asked = sum(tensor.numel() for tensor in tensors.values())
    if asked > sum(stored.values()) + MAX_EXPANDED:
        raise ValueError(f"{path} has tensors of {asked:,} values, but holds only {sum(stored.values()):,} bytes of them")


def plain_names(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Without the prefixes that DistributedDataParallel and ``torch.compile`` put before names."""
    plain = {key.replace("_orig_mod.", "").removeprefix("module."): value for key, value in tensors.items()}
    if len(plain) < len(tensors):
        raise ValueError(f"{path} holds tensors twice, with and without the prefix 'module.' or '_orig_mod.'")
    return plain


def hint_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def read_hint(path: Path) -> dict:
    """What ``<file name>.json`` beside a file says of it; empty if there is none.

    Its keys: ``family`` (a name in ``FAMILIES``), ``sigma_data`` (standard deviation of the data), ``network_config``
    (constructor arguments of the network, in place of those that were read from the shapes).

    Raises:
        ValueError: malformed JSON, another key, or a value of the wrong kind.
    """
    path = hint_path(path)
    if not path.is_file():
        return {}
    hint = read_json_value(path)
    if not isinstance(hint, dict) or hint.keys() - HINTS:
        raise ValueError(f"{path} must be a mapping with keys among {', '.join(sorted(HINTS))}")
    sigma_data = hint.get("sigma_data", 1.0)
    if not is_number(sigma_data) or not 0 < sigma_data < math.inf:
        raise ValueError(f"{path}: sigma_data must be a positive number, got {repr(sigma_data)[:80]}")
    if not isinstance(hint.get("network_config", {}), dict):
        raise ValueError(f"{path}: network_config must be a mapping of constructor arguments")
    names = [family.name for family in FAMILIES]
    if hint.get("family", names[0]) not in names:
        raise ValueError(f"{path}: family is {repr(hint['family'])[:80]}; allowed: {', '.join(names)}")
    return hint


def choose_family(tensors: dict[str, Tensor], hint: str | None, path: Path) -> Family:
    """The one that the tensors fit, or of several that they fit the one that was asked for."""
    fitting = {family.name: family for family in FAMILIES if family.matches(tensors)}
    names = ", ".join(fitting)
    if not fitting:
        known = ", ".join(family.name for family in FAMILIES)
        raise ValueError(f"{path} holds no network that is known ({known}); its first tensors: {', '.join([*tensors][:3])}")
    if hint is None and len(fitting) > 1:
        example = f'{{"family": "{next(iter(fitting))}"}}'
        raise ValueError(f"{path} can be each of {names}, which its tensors do not tell apart: write {example} or another "
                         f"of them into {hint_path(path)}")  # fmt: skip
    if hint is not None and hint not in fitting:
        raise ValueError(f"{path} cannot be of kind {hint}: its tensors fit {names}")
    return fitting[hint or names]
