"""How each source normalises the latents of a variational autoencoder, and how they become images. Exported pipelines
carry this file.

A network never sees the autoencoder's latents ``z`` themselves but ``x = scale z + bias``, per channel. Papers differ in the
two constants, and in the range in which images enter the autoencoder; a :class:`LatentNormalization` says both. ``vae`` is
one of :mod:`distill.autoencoders` throughout.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.autoencoders import decode_latents, encode_images, latent_channels


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
    channels = latent_channels(vae)
    if {len(found.scale), len(found.bias)} - {1, channels}:
        have = max(len(found.scale), len(found.bias))
        raise ValueError(f"normalization {name!r} is for {have} channels, the autoencoder's latents have {channels}")
    return found


def vae_normalization(vae: nn.Module) -> LatentNormalization:
    """``x = (z - mean) / std * scaling_factor`` with ``latents_mean``, ``latents_std`` and ``scaling_factor`` of its config
    (SDXL; Qwen-Image and Wan, without the last); without the first two ``x = (z - shift_factor) * scaling_factor`` (Stable
    Diffusion 3, Flux; Sana, without the first).
    """
    mean, std, shift = (vae.config.get(key) for key in ("latents_mean", "latents_std", "shift_factor"))
    scale = vae.config.get("scaling_factor", 1.0)
    if mean is not None and std is not None:
        return LatentNormalization.standardizing(-1.0, mean, std, scale)
    return LatentNormalization(-1.0, (scale,), (-(shift or 0.0) * scale,))


@torch.no_grad()
def encode(vae: nn.Module, images: Tensor, norm: LatentNormalization) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``(B, C, h, w)`` of the latents ``z``, not yet normalised, of images in [-1, 1]."""
    width = (1 - norm.image_low) / 2
    return encode_images(vae, 1 + (images - 1) * width)


@torch.no_grad()
def decode(vae: nn.Module, x: Tensor, norm: LatentNormalization) -> Tensor:
    """Images ``(B, C, H, W)`` in [-1, 1], clamped, of normalised latents ``(B, C, h, w)``, or of videos of one frame
    ``(B, C, 1, h, w)``.
    """
    width = (1 - norm.image_low) / 2
    still = x[:, :, 0] if x.ndim == 5 else x
    images = decode_latents(vae, norm.inverse(still)).clamp(norm.image_low, 1)
    return 1 + (images - 1) / width
