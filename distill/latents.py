"""Autoencoders from disk, and cached latents read back for training; how they are normalised is in
:mod:`distill.normalization`.

``distill precompute latents`` (:mod:`distill.precompute`) keeps the mean and standard deviation of the latents, from which
training draws them anew in every epoch, as EDM2 does (arXiv 2312.02696).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset

from distill.autoencoders import autoencoder_class, image_channels, latent_channels
from distill.device import default_device
from distill.normalization import LatentNormalization, decode, normalization
from distill.shards import MANIFEST, Kind, Shards, is_folder_of, open_shard
from teachers import hub
from teachers.diffusers import has_safetensors, read_json
from teachers.networks import is_number
from teachers.pretrained import is_size

COMPONENTS = ("vae", "vqvae")  # where pipelines keep their autoencoder
LATENTS = Kind("latents", frozenset({"normalization", "sample_shape", "label_column"}))


def vae_folder(source: str | Path) -> Path:
    """Where an autoencoder lies that is named by its folder or by its pipeline's, on disk or on the hub.

    Raises:
        ValueError, OSError: see :func:`teachers.hub.fetch`.
    """
    folder = hub.fetch_model(source, ".", *COMPONENTS) if hub.is_hub(source) else Path(source)
    return next((folder / name for name in COMPONENTS if (folder / name).is_dir()), folder)


def load_vae(source: str | Path) -> nn.Module:
    """A diffusers autoencoder from its folder, in fp32, on a GPU if there is one; see :func:`vae_folder`.

    Raises:
        FileNotFoundError, ValueError: no such folder, another kind of model, or weights that are damaged; one sentence.
    """
    folder = vae_folder(source)
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"no autoencoder in {folder}: it has no config.json")
    cls = autoencoder_class(read_json(config).get("_class_name"), str(config))
    try:
        vae, info = cls.from_pretrained(
            folder, local_files_only=True, use_safetensors=has_safetensors(folder), torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"the autoencoder in {folder} cannot be loaded: {reason}") from error
    wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if wrong:
        raise ValueError(f"the autoencoder in {folder} has tensors missing or too many: {', '.join(map(str, wrong[:3]))}")
    return vae.to(default_device()).eval()


class Decoder:
    """An autoencoder that makes images of a network's samples.

    Args:
        folder: an autoencoder of diffusers, as of :func:`load_vae`.
        norm_name: the normalisation of the latents that the network was trained on, one of
            ``distill.normalization.NAMES``.
        sample_shape: of the network's samples, ``(C, h, w)`` or ``(C, 1, h, w)``.

    Raises:
        FileNotFoundError, ValueError: a bad autoencoder, one of other latents, samples that are videos, or no such
            normalisation; one sentence each.
    """

    def __init__(self, folder: str | Path, norm_name: str, sample_shape: Sequence[int]):
        channels, *frames = sample_shape[:-2]
        if frames not in ([], [1]):
            raise ValueError(f"the model's samples are videos of {frames[0]} latent frames; images are decoded of one frame")
        self.vae = load_vae(Path(folder))
        self.normalization = normalization(norm_name, self.vae)
        own = latent_channels(self.vae)
        if own != channels:
            raise ValueError(f"{folder} is an autoencoder of {own} latent channels, but the model's samples have {channels}")

    @property
    def image_channels(self) -> int:
        return image_channels(self.vae)

    def __call__(self, x: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` in [-1, 1] of samples, on their device."""
        # One at a time: each takes far more memory than its latent.
        parts = [decode(self.vae, part.to(self.vae.device), self.normalization) for part in x.split(1)]
        return torch.cat(parts).to(x.device)


def is_latents_folder(source: str | Path) -> bool:
    """Whether ``distill precompute latents`` wrote, or began to write, this folder."""
    return is_folder_of(LATENTS, source)


class Latents(Dataset):
    """Cached latents as pairs of a normalised sample ``(C, h, w)``, fp32, and an integer label (0 if there is none).

    Index ``i + n len(self)`` is latent ``i`` in epoch ``n``: the same mean and standard deviation, another noise. The noise
    is a function of seed, epoch and ``i`` alone, whatever the batches and processes.

    Raises:
        FileNotFoundError: a file that the manifest lists is missing.
        ValueError: a folder that is not finished or damaged; one sentence each.
    """

    def __init__(self, folder: str | Path, seed: int = 0):
        self.seed, self.shards = seed, Shards(folder, LATENTS)
        manifest = self.shards.manifest
        self.shape: list[int] = manifest["sample_shape"]
        where = self.shards.folder / MANIFEST
        if not (isinstance(self.shape, list) and len(self.shape) == 3 and all(map(is_size, self.shape))):
            raise ValueError(f"{where}: sample_shape must be a list of 3 sizes, got {str(self.shape)[:80]}")
        self.normalization = normalization_of(manifest["normalization"], self.shape[0], where)
        self.labelled = manifest["label_column"] is not None
        self.shards.check_rows({"mean": self.shape, "std": self.shape, **({"labels": ()} if self.labelled else {})})
        self.labels = torch.zeros(len(self), dtype=torch.long)
        if self.labelled:
            files = [open_shard(self.shards.folder / name) for name in self.shards.names]
            self.labels = torch.cat([file.get_tensor("labels") for file in files]).long()

    def as_videos(self) -> "Latents":
        """Samples become videos of one frame, ``(C, 1, h, w)``."""
        self.shape = [self.shape[0], 1, *self.shape[-2:]]
        return self

    def __len__(self) -> int:
        return self.shards.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        epoch, row = divmod(index, len(self))
        shard, place = self.shards.place(row)
        mean, std = (shard.get_slice(key)[place].float() for key in ("mean", "std"))
        digest = hashlib.sha256(f"latent {self.seed} {epoch} {row}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        z = mean + std * torch.randn(mean.shape, generator=generator)
        return self.normalization(z).reshape(self.shape), int(self.labels[row])


def normalization_of(constants, channels: int, where: Path) -> LatentNormalization:
    """The reverse of :func:`constants_of`, from a manifest.

    Raises:
        ValueError: not the constants of a normalisation of so many channels.
    """
    values = constants if isinstance(constants, dict) else {}
    scale, bias = values.get("scale"), values.get("bias")
    lists = all(isinstance(v, list) and len(v) in (1, channels) and all(map(is_number, v)) for v in (scale, bias))
    if not lists or not is_number(values.get("image_low")):
        raise ValueError(f"{where}: normalization must have image_low, and scale and bias for {channels} channels")
    return LatentNormalization(values["image_low"], scale, bias)


def constants_of(norm: LatentNormalization, name: str) -> dict:
    """A normalisation as plain values of a manifest."""
    values = asdict(norm)
    return {"name": name, **values, "scale": list(values["scale"]), "bias": list(values["bias"])}
