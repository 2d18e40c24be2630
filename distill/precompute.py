"""Data prepared once, before any training: the latents of images, in files that training reads (:mod:`distill.latents`).

The manifest is written first, with what the latents depend on, and again after each shard, with its hash. So at any moment
the folder holds whole shards and says which; a run that was killed goes on at the first one missing.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from distill.data import Images, image_labels, load_images
from distill.latents import (
    FORMAT,
    MANIFEST,
    VERSION,
    LatentNormalization,
    constants_of,
    encode,
    file_hash,
    is_latents_folder,
    normalization,
    read_manifest,
    shard_names,
)
from distill.recipe import DataConfig
from teachers import hub
from teachers.diffusers import has_safetensors, read_json
from teachers.pretrained import check_target, write_atomically

DTYPES = {"float32": torch.float32, "float16": torch.float16}
# What a manifest says that is not an input of the latents.
NOT_COMPARED = ("source", "shards")


def precompute_latents(
    data: DataConfig, folder: str | Path, vae_source: str | Path, norm_name: str, batch_size: int = 16,
    shard_size: int = 4096, dtype: str = "float32",
) -> bool:  # fmt: skip
    """Encode images to a folder of latents, or finish one that was begun.

    Args:
        data: the images, as in a recipe.
        vae_source: a diffusers ``AutoencoderKL``: its folder, its pipeline's, or ``hf://owner/name``.
        norm_name: one of ``distill.latents.NAMES``.

    Returns:
        Whether there was anything to do.

    Raises:
        FileNotFoundError, ValueError: bad images, a bad autoencoder, or a folder of other latents; one sentence each.
    """
    if batch_size < 1 or shard_size < 1:
        raise ValueError(f"batch size and shard size must be at least 1, got {batch_size} and {shard_size}")
    folder = Path(folder)
    vae = load_vae(vae_source)
    norm = normalization(norm_name, vae)
    images = load_images(data, vae.config.in_channels)
    labels = image_labels(images)
    facts = {
        "format": FORMAT, "version": VERSION, "source": data.source, "split": data.split,
        "image_column": data.image_column, "label_column": data.label_column,
        # A fingerprint of datasets holds each file's path, size and date.
        "images": images.rows._fingerprint, "vae": vae_hash(vae), "normalization": constants_of(norm, norm_name),
        "count": len(images), "sample_shape": latent_shape(vae, images), "dtype": dtype, "shard_size": shard_size,
    }  # fmt: skip
    manifest = begin(folder, facts)
    names = shard_names(len(images), shard_size)
    missing = [i for i, name in enumerate(names) if name not in manifest["shards"] or not (folder / name).is_file()]
    rows = [range(i * shard_size, min((i + 1) * shard_size, len(images))) for i in missing]
    total = sum(map(len, rows))
    with tqdm(total=len(images), initial=len(images) - total, desc="latents", unit="image", disable=not missing) as bar:
        for i, part in zip(missing, rows, strict=True):
            tensors = encode_rows(vae, images, part, norm, batch_size, data.num_workers, DTYPES[dtype], bar)
            if labels is not None:
                tensors["labels"] = labels[part.start : part.stop].clone()
            write_atomically(folder / names[i], lambda path, tensors=tensors: save_file(tensors, path))
            manifest["shards"][names[i]] = file_hash(folder / names[i])
            write_manifest(folder, manifest)
    return bool(missing)


def begin(folder: Path, facts: dict) -> dict:
    """The folder's manifest: a new one, or that of a run with the same inputs.

    Raises:
        ValueError: the folder holds latents of other inputs, or something else.
    """
    if not is_latents_folder(folder):
        check_target(folder, (), "a folder of latents")
        folder.mkdir(parents=True, exist_ok=True)
        manifest = {**facts, "shards": {}}
        write_manifest(folder, manifest)
        return manifest
    manifest = read_manifest(folder)
    for key in facts.keys() - set(NOT_COMPARED):
        if manifest.get(key) != facts[key]:
            raise ValueError(
                f"{folder} holds latents with another {key} ({brief(manifest.get(key))}; asked for: {brief(facts[key])}); "
                "give another folder"
            )
    for path in folder.glob(".*.tmp"):  # of a run that was killed while it wrote
        path.unlink()
    return manifest


def brief(value) -> str:
    return str(value.get("name")) if isinstance(value, dict) else str(value)[:40]


def write_manifest(folder: Path, manifest: dict) -> None:
    write_atomically(folder / MANIFEST, lambda path: path.write_text(json.dumps(manifest, indent=2) + "\n"))


def encode_rows(
    vae: AutoencoderKL, images: Images, rows: range, norm: LatentNormalization, batch_size: int, num_workers: int,
    dtype: torch.dtype, bar: tqdm,
) -> dict[str, Tensor]:  # fmt: skip
    """``mean`` and ``std`` ``(len(rows), C, h, w)`` of some of the images."""
    means, stds = [], []
    for batch in image_batches(images, rows, batch_size, num_workers):
        mean, std = (part.to(dtype).cpu() for part in encode(vae, batch.to(vae.device), norm))
        if not (mean.isfinite().all() and std.isfinite().all()):
            hint = "; try float32" if dtype == torch.float16 else ""
            raise ValueError(f"the autoencoder's latents of images {rows.start} to {rows.stop - 1} are not finite{hint}")
        means.append(mean)
        stds.append(std)
        bar.update(len(batch))
    return {"mean": torch.cat(means).contiguous(), "std": torch.cat(stds).contiguous()}


def image_batches(images: Images, rows: range, batch_size: int, num_workers: int) -> Iterator[Tensor]:
    """``(B, C, H, W)``, in order."""
    wanted = images[0][0].shape
    start = rows.start
    for batch in DataLoader(Subset(images, rows), batch_size, num_workers=num_workers, collate_fn=list):
        for i, (image, _) in enumerate(batch):
            if image.shape != wanted:
                raise ValueError(f"image {start + i} has shape {list(image.shape)}, the first one {list(wanted)}")
        start += len(batch)
        yield torch.stack([image for image, _ in batch])


def vae_folder(source: str | Path) -> Path:
    """Where an autoencoder lies that is named by its folder or by its pipeline's, on disk or on the hub.

    Raises:
        ValueError, OSError: see :func:`teachers.hub.fetch`.
    """
    folder = hub.fetch_model(source, ".", "vae") if hub.is_hub(source) else Path(source)
    return folder / "vae" if (folder / "vae").is_dir() else folder


def load_vae(source: str | Path) -> AutoencoderKL:
    """A diffusers autoencoder from its folder, in fp32, on a GPU if there is one; see :func:`vae_folder`.

    Raises:
        FileNotFoundError, ValueError: no such folder, another kind of model, or weights that are damaged; one sentence.
    """
    folder = vae_folder(source)
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"no autoencoder in {folder}: it has no config.json")
    kind = read_json(config).get("_class_name")
    if kind != "AutoencoderKL":
        raise ValueError(f"{config} is of a {kind}; supported: AutoencoderKL")
    try:
        vae, info = AutoencoderKL.from_pretrained(
            folder, local_files_only=True, use_safetensors=has_safetensors(folder), torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"the autoencoder in {folder} cannot be loaded: {reason}") from error
    wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if wrong:
        raise ValueError(f"the autoencoder in {folder} has tensors missing or too many: {', '.join(map(str, wrong[:3]))}")
    return vae.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def vae_hash(vae: AutoencoderKL) -> str:
    """Of its config and its weights, whatever files they came in."""
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def latent_shape(vae: AutoencoderKL, images: Images) -> list[int]:
    """``[C, h, w]`` of the first image's latent.

    Raises:
        ValueError: an image whose sides the autoencoder cannot halve as often as it does.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = images[0][0].shape[1:]
    if height % factor or width % factor:
        raise ValueError(f"images are {height}x{width}, the autoencoder needs multiples of {factor}")
    return [vae.config.latent_channels, height // factor, width // factor]
