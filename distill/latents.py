"""Latents of a variational autoencoder: how each source normalises them, and cached ones read back for training.

A network never sees the autoencoder's latents ``z`` themselves but ``x = scale z + bias``, per channel. Papers differ in the
two constants, and in the range in which images enter the autoencoder; a :class:`LatentNormalization` says both.
``distill precompute latents`` (:mod:`distill.precompute`) keeps the mean and standard deviation of ``z``, from which
training draws ``z`` anew in every epoch, as EDM2 does (arXiv 2312.02696). ``vae`` is a diffusers ``AutoencoderKL``
throughout.
"""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset

from distill.shards import Kind, Shards, is_folder_of, open_shard
from teachers import hub
from teachers.diffusers import has_safetensors, read_json

LATENTS = Kind("latents", frozenset({"normalization", "sample_shape", "label_column"}))


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


def vae_folder(source: str | Path) -> Path:
    """Where an autoencoder lies that is named by its folder or by its pipeline's, on disk or on the hub.

    Raises:
        ValueError, OSError: see :func:`teachers.hub.fetch`.
    """
    folder = hub.fetch_model(source, ".", "vae") if hub.is_hub(source) else Path(source)
    return folder / "vae" if (folder / "vae").is_dir() else folder


def load_vae(source: str | Path) -> nn.Module:
    """A diffusers autoencoder from its folder, in fp32, on a GPU if there is one; see :func:`vae_folder`.

    Raises:
        FileNotFoundError, ValueError: no such folder, another kind of model, or weights that are damaged; one sentence.
    """
    from diffusers import AutoencoderKL  # slow, and training does not need it

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


class Decoder:
    """An autoencoder that makes images of a network's samples.

    Args:
        folder: a diffusers ``AutoencoderKL``, as of :func:`load_vae`.
        norm_name: the normalisation of the latents that the network was trained on, one of ``NAMES``.
        channels: of the network's samples.

    Raises:
        FileNotFoundError, ValueError: a bad autoencoder, one of other latents, or no such normalisation; one sentence each.
    """

    def __init__(self, folder: str | Path, norm_name: str, channels: int):
        self.vae = load_vae(Path(folder))
        self.normalization = normalization(norm_name, self.vae)
        own = self.vae.config.latent_channels
        if own != channels:
            raise ValueError(f"{folder} is an autoencoder of {own} latent channels, but the model's samples have {channels}")

    @property
    def image_channels(self) -> int:
        return self.vae.config.out_channels

    def __call__(self, x: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` in [-1, 1] of samples ``(B, C, h, w)``, on their device."""
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
        constants = manifest["normalization"]
        self.normalization = LatentNormalization(constants["image_low"], constants["scale"], constants["bias"])
        self.shape: list[int] = manifest["sample_shape"]
        self.labelled = manifest["label_column"] is not None
        self.labels = torch.zeros(len(self), dtype=torch.long)
        if self.labelled:
            files = [open_shard(self.shards.folder / name) for name in self.shards.names]
            self.labels = torch.cat([file.get_tensor("labels") for file in files])

    def __len__(self) -> int:
        return self.shards.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        epoch, row = divmod(index, len(self))
        shard, place = self.shards.place(row)
        mean, std = (shard.get_slice(key)[place].float() for key in ("mean", "std"))
        digest = hashlib.sha256(f"latent {self.seed} {epoch} {row}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        return self.normalization(mean + std * torch.randn(mean.shape, generator=generator)), int(self.labels[row])


def constants_of(norm: LatentNormalization, name: str) -> dict:
    """A normalisation as plain values of a manifest."""
    values = asdict(norm)
    return {"name": name, **values, "scale": list(values["scale"]), "bias": list(values["bias"])}
