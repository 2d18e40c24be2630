"""Latents of a variational autoencoder: how each source normalises them, and cached ones read back for training.

A network never sees the autoencoder's latents ``z`` themselves but ``x = scale z + bias``, per channel. Papers differ in the
two constants, and in the range in which images enter the autoencoder; a :class:`LatentNormalization` says both.
``distill precompute latents`` (:mod:`distill.precompute`) keeps the mean and standard deviation of ``z``, from which
training draws ``z`` anew in every epoch, as EDM2 does (arXiv 2312.02696). ``vae`` is a diffusers ``AutoencoderKL``
throughout.
"""

import hashlib
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import Dataset

from teachers.diffusers import read_json

MANIFEST = "manifest.json"
FORMAT, VERSION = "scm-distill-latents", 1


@dataclass(frozen=True)
class LatentNormalization:
    """``x = scale z + bias`` of an autoencoder's latents ``z`` for images in ``[image_low, 1]``.

    ``scale`` and ``bias`` have one entry a channel, or a single one for all channels.
    """

    image_low: float
    scale: tuple[float, ...]
    bias: tuple[float, ...]

    def __post_init__(self):
        if self.image_low not in (0.0, -1.0):
            raise ValueError(f"images enter an autoencoder in [0, 1] or [-1, 1], image_low is {self.image_low}")
        object.__setattr__(self, "scale", tuple(self.scale))
        object.__setattr__(self, "bias", tuple(self.bias))

    @classmethod
    def standardizing(cls, image_low: float, mean, std, sigma_data: float) -> "LatentNormalization":
        """``x = sigma_data (z - mean) / std``: latents with this mean and standard deviation get those of the data."""
        scale = tuple(sigma_data / s for s in std)
        return cls(image_low, scale, tuple(-m * s for m, s in zip(mean, scale, strict=True)))

    def __call__(self, z: Tensor) -> Tensor:
        """``x`` of latents ``(..., C, H, W)``."""
        return z * self._column(self.scale, z) + self._column(self.bias, z)

    def inverse(self, x: Tensor) -> Tensor:
        """``z`` of what a network saw or made, ``(..., C, H, W)``."""
        return (x - self._column(self.bias, x)) / self._column(self.scale, x)

    @staticmethod
    def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]


# Sources: EDM2's latents are those of images in [0, 1], though the autoencoder was trained for [-1, 1]: its teachers need
# exactly this (arXiv 2312.02696; its statistics of ImageNet-512). sCM puts the images right (arXiv 2410.11081, appendix G).
# Both divide by the latents' own spread and multiply by sigma_data = 0.5. Stable Diffusion, DiT and SiT multiply by
# one number (arXiv 2112.10752, appendix D.1).
NORMALIZATIONS = {
    "edm2": LatentNormalization.standardizing(0.0, [5.81, 3.25, 0.12, -2.15], [4.17, 4.62, 3.71, 3.28], 0.5),
    "scm": LatentNormalization.standardizing(-1.0, [1.56, -0.695, 0.483, 0.729], [5.27, 5.91, 4.21, 4.31], 0.5),
    "sd": LatentNormalization(-1.0, (0.18215,), (0.0,)),
}
NAMES = (*NORMALIZATIONS, "vae")


def normalization(name: str, vae: nn.Module) -> LatentNormalization:
    """A preset, or with ``vae`` what the autoencoder's own config says.

    Raises:
        ValueError: an unknown name, or constants for another number of channels.
    """
    if name not in NAMES:
        raise ValueError(f"no normalization {name!r}; allowed: {', '.join(NAMES)}")
    found = vae_normalization(vae) if name == "vae" else NORMALIZATIONS[name]
    channels = vae.config.latent_channels
    if {len(found.scale), len(found.bias)} - {1, channels}:
        have = max(len(found.scale), len(found.bias))
        raise ValueError(f"normalization {name!r} is for {have} channels, the autoencoder's latents have {channels}")
    return found


def vae_normalization(vae: nn.Module) -> LatentNormalization:
    """``x = (z - mean) / std * scaling_factor`` with ``latents_mean``, ``latents_std`` and ``scaling_factor`` of its config
    (SDXL); without the first two ``x = (z - shift_factor) * scaling_factor`` (Stable Diffusion 3, Flux).
    """
    config = vae.config
    if config.latents_mean is not None and config.latents_std is not None:
        return LatentNormalization.standardizing(-1.0, config.latents_mean, config.latents_std, config.scaling_factor)
    shift = config.shift_factor or 0.0
    return LatentNormalization(-1.0, (config.scaling_factor,), (-shift * config.scaling_factor,))


@torch.no_grad()
def encode(vae: nn.Module, images: Tensor, norm: LatentNormalization) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``(B, C, h, w)`` of the latents ``z``, not yet normalised, of images in [-1, 1]."""
    width = (1 - norm.image_low) / 2
    posterior = vae.encode(1 + (images - 1) * width).latent_dist
    return posterior.mean, posterior.std


@torch.no_grad()
def decode(vae: nn.Module, x: Tensor, norm: LatentNormalization) -> Tensor:
    """Images ``(B, C, H, W)`` in [-1, 1] of normalised latents ``(B, C, h, w)``, clamped."""
    width = (1 - norm.image_low) / 2
    images = vae.decode(norm.inverse(x)).sample.clamp(norm.image_low, 1)
    return 1 + (images - 1) / width


def is_latents_folder(source: str | Path) -> bool:
    """Whether ``distill precompute latents`` wrote, or began to write, this folder."""
    path = Path(source) / MANIFEST
    return path.is_file() and read_json(path).get("format") == FORMAT


def read_manifest(folder: Path) -> dict:
    """The ``manifest.json`` of a folder of latents.

    Raises:
        ValueError: it is damaged or of another version.
    """
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise ValueError(f"{folder / MANIFEST} is not a {FORMAT} version {VERSION} manifest")
    missing = {"normalization", "count", "sample_shape", "label_column", "shard_size", "shards"} - manifest.keys()
    if missing:
        raise ValueError(f"{folder / MANIFEST} lacks the key {min(missing)!r}")
    return manifest


def shard_names(count: int, shard_size: int) -> list[str]:
    """The files of ``count`` latents, in order."""
    return [f"latents-{i:05d}.safetensors" for i in range(-(-count // shard_size))]


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Latents(Dataset):
    """Cached latents as pairs of a normalised sample ``(C, h, w)``, fp32, and an integer label (0 if there is none).

    Index ``i + n len(self)`` is latent ``i`` in epoch ``n``: the same mean and standard deviation, another noise. The noise
    is a function of seed, epoch and ``i`` alone, whatever the batches and processes.

    Raises:
        FileNotFoundError: a file that the manifest lists is missing.
        ValueError: a folder that is not finished or damaged; one sentence each.
    """

    def __init__(self, folder: str | Path, seed: int = 0):
        self.folder, self.seed = Path(folder), seed
        manifest = read_manifest(self.folder)
        constants = manifest["normalization"]
        self.normalization = LatentNormalization(constants["image_low"], constants["scale"], constants["bias"])
        self.count, self.shard_size = manifest["count"], manifest["shard_size"]
        self.shape: list[int] = manifest["sample_shape"]
        self.labelled = manifest["label_column"] is not None
        self.names = shard_names(self.count, self.shard_size)
        self.verify(manifest["shards"])
        self.labels = torch.zeros(self.count, dtype=torch.long)
        if self.labelled:
            self.labels = torch.cat([open_shard(self.folder / name).get_tensor("labels") for name in self.names])

    def verify(self, hashes: dict[str, str]) -> None:
        """Read every file once and compare it with the manifest."""
        open_shard.cache_clear()  # a file may have been replaced since it was opened
        done = sum(name in hashes for name in self.names)
        if done < len(self.names):
            raise ValueError(
                f"the latents in {self.folder} are not finished: {done} of {len(self.names)} shards; "
                "run the same distill precompute latents again, it goes on from there"
            )
        again = "delete it and run the same distill precompute latents again"
        for name in self.names:
            path = self.folder / name
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing; run the same distill precompute latents again")
            if file_hash(path) != hashes[name]:
                raise ValueError(f"{path} is not the file that its manifest describes (damaged or changed); {again}")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        epoch, row = divmod(index, self.count)
        number, place = divmod(row, self.shard_size)
        shard = open_shard(self.folder / self.names[number])
        mean, std = (shard.get_slice(key)[place].float() for key in ("mean", "std"))
        digest = hashlib.sha256(f"latent {self.seed} {epoch} {row}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        return self.normalization(mean + std * torch.randn(mean.shape, generator=generator)), int(self.labels[row])


@lru_cache(maxsize=256)
def open_shard(path: Path):
    """A shard, mapped into memory. Each process opens its own."""
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None


def constants_of(norm: LatentNormalization, name: str) -> dict:
    """A normalisation as plain values of a manifest."""
    values = asdict(norm)
    return {"name": name, **values, "scale": list(values["scale"]), "bias": list(values["bias"])}
