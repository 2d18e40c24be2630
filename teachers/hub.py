"""Models on the Hugging Face hub, written ``hf://owner/name[@revision][/path/in/repo]``: the scheme asks for a download.

Files land in the cache of ``huggingface_hub`` (``HF_HOME``) and are read from there where the hub cannot be reached or
``HF_HUB_OFFLINE=1`` says not to try. Only files that are read are fetched.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

SCHEME = "hf:/"  # the second slash is lost where a source was turned into a path
SYNTAX = "hf://owner/name[@revision][/path/in/repo]"
PLACE = re.compile(r"hf:/{1,2}([\w.-]+/[\w.-]+)(?:@(refs/(?:pr|convert)/\w+|[^/\s]+))?(?:/([^*?\[\]]+?))?/?")
CONFIG, MODEL_WEIGHTS = "config.json", "diffusion_pytorch_model"


class Place(NamedTuple):
    """A repository, or a file or folder in it (``path``; empty for all of it), at a branch, tag or commit."""

    repo: str
    revision: str | None
    path: str


def is_hub(source: str | Path) -> bool:
    return str(source).startswith(SCHEME)


def parse(source: str | Path) -> Place:
    """The parts of a hub id.

    Raises:
        ValueError: it is not of the form ``hf://owner/name[@revision][/path/in/repo]``.
    """
    match = PLACE.fullmatch(str(source))
    if match is None or ".." in str(source):
        raise ValueError(f"{str(source)!r} is no place on the Hugging Face hub: it must look like {SYNTAX}")
    return Place(match[1], match[2], match[3] or "")


def fetch(source: str | Path, names: Iterable[str]) -> Path:
    """The local copy of a place on the hub: a file, with ``<name>.json`` beside it if there is one; or a folder with those
    of its files that are named (``*`` is any text).

    Raises:
        ValueError: bad syntax.
        FileNotFoundError: no such repository, revision, file or folder; or no network and nothing in the cache.
        OSError: the download failed, for example by a full disk.
    """
    from huggingface_hub import constants, errors, snapshot_download  # slow, and only needed here

    repo, revision, path = place = parse(source)
    wanted = [f"{path}/{name}" for name in names] + [path, f"{path}.json"] if path else list(names)
    try:
        found = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted)) / path
    except errors.GatedRepoError:
        raise FileNotFoundError(
            f"{source} is gated: accept its terms at {constants.ENDPOINT}/{repo} and log in (hf auth login)"
        ) from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(f"no model {str(source)!r}: the hub has no {repo}, or not for you (hf auth login)") from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"no model {str(source)!r}: {repo} has no branch, tag or commit {revision!r}") from None
    except errors.LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "the hub cannot be reached"
        cache = constants.HF_HUB_CACHE
        raise FileNotFoundError(f"no model {str(source)!r}: {why}, and not all of it is in {cache}") from None
    except errors.HFValidationError as error:
        raise ValueError(f"{str(source)!r} is no place on the Hugging Face hub: {first_line(error)}") from None
    except Exception as error:  # of the network, of storage, of the disk: the hub's client raises many kinds
        raise OSError(f"{source} cannot be fetched: {first_line(error)}") from error
    if not found.exists():
        raise FileNotFoundError(f"no model {str(source)!r}: {absent(place)}")
    return found


def absent(place: Place) -> str:
    """What is not there where nothing was fetched."""
    if place.path:
        return f"{place.repo} has no file or folder {place.path!r} with a model (or, without a network, none in the cache)"
    return f"{place.repo} has no pipeline and no model folder; name one of its files or folders: hf://{place.repo}/PATH"


def fetch_model(source: str | Path, *folders: str) -> Path:
    """The local copy of a place on the hub with config and weights of the diffusers model in those of its folders that there
    are (``"."`` is itself): the weights as safetensors, or where there are none as ``.bin``.

    Raises:
        ValueError, OSError: as :func:`fetch`.
    """
    for suffix in ("safetensors", "bin"):
        files = f"{MODEL_WEIGHTS}.{suffix}", f"{MODEL_WEIGHTS}-*.{suffix}", f"{MODEL_WEIGHTS}.{suffix}.index.json"
        names = [(Path(folder) / name).as_posix() for folder in folders for name in (CONFIG, *files)]
        local = fetch(source, names)
        if any(path for folder in folders for path in (local / folder).glob(f"{MODEL_WEIGHTS}*.{suffix}")):
            break
    return local


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
