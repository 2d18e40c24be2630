"""Data prepared once, before any training: the latents of images and the embeddings of prompts, in files that training
reads (:mod:`distill.latents`, :mod:`distill.prompts`). How they lie on the disk is in :mod:`distill.shards`.
"""

from collections.abc import Iterator
from pathlib import Path

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from distill.autoencoders import image_channels, latent_channels, reduction
from distill.data import Images, image_labels, load_images, open_rows
from distill.latents import LATENTS, constants_of, load_vae
from distill.normalization import LatentNormalization, encode, normalization
from distill.prompts import NULL, PROMPTS, TextEncoders
from distill.recipe import DataConfig
from distill.shards import add_shard, begin, hash_of, is_missing, model_hash, shard_rows

DTYPES = {"float32": torch.float32, "float16": torch.float16}


def precompute_latents(
    data: DataConfig, folder: str | Path, vae_source: str | Path, norm_name: str, batch_size: int = 16,
    shard_size: int = 4096, dtype: str = "float32",
) -> bool:  # fmt: skip
    """Encode images to a folder of latents, or finish one that was begun.

    Args:
        data: the images, as in a recipe.
        vae_source: an autoencoder of diffusers: its folder, its pipeline's, or ``hf://owner/name``.
        norm_name: one of ``distill.normalization.NAMES``.

    Returns:
        Whether there was anything to do.

    Raises:
        FileNotFoundError, ValueError: bad images, a bad autoencoder, or a folder of other latents; one sentence each.
    """
    check_sizes(batch_size, shard_size)
    folder = Path(folder)
    vae = load_vae(vae_source)
    norm = normalization(norm_name, vae)
    images = load_images(data, image_channels(vae))
    labels = image_labels(images)
    facts = {
        "source": data.source, "split": data.split,
        "image_column": data.image_column, "label_column": data.label_column,
        # A fingerprint of datasets holds each file's path, size and date.
        "images": images.rows._fingerprint, "vae": vae_hash(vae), "normalization": constants_of(norm, norm_name),
        "count": len(images), "sample_shape": latent_shape(vae, images), "dtype": dtype, "shard_size": shard_size,
    }  # fmt: skip
    manifest = begin(folder, LATENTS, facts)
    missing = missing_rows(folder, manifest, shard_rows(LATENTS, len(images), shard_size))
    with progress("latents", "image", len(images), missing) as bar:
        for name, rows in missing.items():
            tensors = encode_rows(vae, images, rows, norm, batch_size, data.num_workers, DTYPES[dtype], bar)
            if labels is not None:
                tensors["labels"] = labels[rows.start : rows.stop].clone()
            add_shard(folder, manifest, name, tensors)
    return bool(missing)


def precompute_prompts(
    pipeline: str | Path, captions: list[str], folder: str | Path, source: str = "in memory", negative_prompt: str = "",
    batch_size: int = 16, shard_size: int = 1024, dtype: str = "float16", max_sequence_length: int | None = None,
) -> bool:  # fmt: skip
    """Embed prompts by the text encoders of a diffusers pipeline, or finish a folder that was begun.

    Args:
        pipeline: its folder on disk; nothing but the text encoders is loaded, and nothing downloaded.
        captions: the prompts, of which row ``i`` of the folder becomes the ``i``-th.
        source: where they came from, for the manifest.
        negative_prompt: what becomes the null prompt; an empty one is what the pipeline itself takes for none.
        max_sequence_length: tokens a prompt, of pipelines that let one choose; by default theirs.

    Returns:
        Whether there was anything to do.

    Raises:
        FileNotFoundError, ValueError: a bad pipeline, no prompts, or a folder of other prompts; one sentence each.
    """
    check_sizes(batch_size, shard_size)
    if not captions:
        raise ValueError(f"there are no prompts in {source}")
    folder, kept = Path(folder), DTYPES[dtype]
    encoders = TextEncoders(pipeline, max_sequence_length)
    null = cast(encoders.null_prompt(negative_prompt), kept, "the negative prompt")
    facts = {
        "source": source, "prompts": hash_of(captions),
        "negative_prompt": negative_prompt, "pipeline": encoders.name, "text_encoders": encoders.digest(),
        "max_sequence_length": encoders.max_sequence_length, "count": len(captions),
        "shapes": {name: list(tensor.shape[1:]) for name, tensor in null.items()}, "dtype": dtype,
        "shard_size": shard_size,
    }  # fmt: skip
    manifest = begin(folder, PROMPTS, facts)
    no_null = is_missing(folder, manifest, NULL)
    if no_null:
        add_shard(folder, manifest, NULL, null)
    missing = missing_rows(folder, manifest, shard_rows(PROMPTS, len(captions), shard_size))
    with progress("prompts", "prompt", len(captions), missing) as bar:
        for name, rows in missing.items():
            add_shard(folder, manifest, name, embed_rows(encoders, captions, rows, batch_size, kept, bar))
    return no_null or bool(missing)


def embed_rows(
    encoders: TextEncoders, captions: list[str], rows: range, batch_size: int, dtype: torch.dtype, bar: tqdm
) -> dict[str, Tensor]:
    """The embeddings of some of the prompts, by name."""
    batches = []
    for start in range(rows.start, rows.stop, batch_size):
        part = captions[start : min(start + batch_size, rows.stop)]
        batches.append(cast(encoders(part), dtype, f"prompts {start} to {start + len(part) - 1}"))
        bar.update(len(part))
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def cast(tensors: dict[str, Tensor], dtype: torch.dtype, what: str) -> dict[str, Tensor]:
    """Tensors as they are kept: on the CPU, those in floating point in ``dtype``.

    Raises:
        ValueError: one that is not finite.
    """
    kept = {n: (x.to(dtype) if x.is_floating_point() else x).cpu().contiguous() for n, x in tensors.items()}
    check_finite(list(kept.values()), dtype, f"the text encoders' embeddings of {what}")
    return kept


def read_captions(source: str, column: str = "text", split: str = "train") -> list[str]:
    """Prompts: the lines of a ``.txt`` file, an empty one being an empty prompt; or a column of text of a data source.

    Raises:
        FileNotFoundError, ValueError: no such file or source, or no text in it; one sentence.
    """
    if source.endswith(".txt"):
        return read_lines(Path(source))
    rows = open_rows(source, split)
    if column not in rows.column_names:
        raise ValueError(f"data source {source!r} has no column {column!r}; it has: {', '.join(rows.column_names)}")
    kind = rows.features[column]
    if not isinstance(kind, datasets.Value) or kind.dtype not in ("string", "large_string"):
        raise ValueError(f"column {column!r} of data source {source!r} holds no text")
    captions = rows[column][:]
    if None in captions:
        raise ValueError(f"row {captions.index(None)} of data source {source!r} has no text in column {column!r}")
    return captions


def read_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} with prompts")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8") from None
    if lines[-1] == "":  # after the last line's end
        del lines[-1]
    return [line.removesuffix("\r") for line in lines]


def check_sizes(batch_size: int, shard_size: int) -> None:
    if batch_size < 1 or shard_size < 1:
        raise ValueError(f"batch size and shard size must be at least 1, got {batch_size} and {shard_size}")


def check_finite(tensors: list[Tensor], dtype: torch.dtype, what: str) -> None:
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise ValueError(f"{what} are not finite{'; try float32' if dtype == torch.float16 else ''}")


def missing_rows(folder: Path, manifest: dict, files: dict[str, range]) -> dict[str, range]:
    return {name: rows for name, rows in files.items() if is_missing(folder, manifest, name)}


def progress(title: str, unit: str, count: int, missing: dict[str, range]) -> tqdm:
    done = count - sum(map(len, missing.values()))
    return tqdm(total=count, initial=done, desc=title, unit=unit, disable=not missing)


def encode_rows(
    vae: nn.Module, images: Images, rows: range, norm: LatentNormalization, batch_size: int, num_workers: int,
    dtype: torch.dtype, bar: tqdm,
) -> dict[str, Tensor]:  # fmt: skip
    """``mean`` and ``std`` ``(len(rows), C, h, w)`` of some of the images."""
    means, stds = [], []
    for batch in image_batches(images, rows, batch_size, num_workers):
        mean, std = (part.to(dtype).cpu() for part in encode(vae, batch.to(vae.device), norm))
        check_finite([mean, std], dtype, f"the autoencoder's latents of images {rows.start} to {rows.stop - 1}")
        means.append(mean)
        stds.append(std)
        bar.update(len(batch))
    return {"mean": torch.cat(means).contiguous(), "std": torch.cat(stds).contiguous()}


def image_batches(images: Images, rows: range, batch_size: int, num_workers: int) -> Iterator[Tensor]:
    """``(B, C, H, W)``, in order."""
    for batch in DataLoader(Subset(images, rows), batch_size, num_workers=num_workers, collate_fn=list):
        yield torch.stack([image for image, _ in batch])


def vae_hash(vae: nn.Module) -> str:
    """Of its config and its weights, whatever files they came in."""
    return model_hash(vae, {key: value for key, value in vae.config.items() if not key.startswith("_")})


def latent_shape(vae: nn.Module, images: Images) -> list[int]:
    """``[C, h, w]`` of the first image's latent.

    Raises:
        ValueError: an image whose sides the autoencoder cannot halve as often as it does.
    """
    factor = reduction(vae)
    height, width = images[0][0].shape[1:]
    if height % factor or width % factor:
        raise ValueError(f"images are {height}x{width}, the autoencoder needs multiples of {factor}")
    return [latent_channels(vae), height // factor, width // factor]
