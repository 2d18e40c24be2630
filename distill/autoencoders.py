"""The autoencoders of diffusers that make images of latents, seen alike. Exported pipelines carry this file.

They differ in the keys of their configs, in whether a latent has a spread, and in whether images are videos of one frame.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Autoencoder(NamedTuple):
    """Keys of the config of a class of autoencoders, and what it encodes."""

    image_channels: str
    latent_channels: str
    resolutions: str  # a list with an entry for each resolution, of which every one is half the last
    video: bool = False  # an image is a video of one frame


AUTOENCODERS = {
    "AutoencoderKL": Autoencoder("in_channels", "latent_channels", "block_out_channels"),
    "AutoencoderDC": Autoencoder("in_channels", "latent_channels", "encoder_block_out_channels"),
    "AutoencoderKLQwenImage": Autoencoder("input_channels", "z_dim", "dim_mult", video=True),
    "AutoencoderKLWan": Autoencoder("in_channels", "z_dim", "dim_mult", video=True),
    "VQModel": Autoencoder("in_channels", "latent_channels", "block_out_channels"),
}


def autoencoder_class(name, where: str) -> type:
    """The class of diffusers that a config names.

    Raises:
        ValueError: it is not one of ``AUTOENCODERS``.
    """
    if not isinstance(name, str) or name not in AUTOENCODERS:
        raise ValueError(f"{where} is of a {name}; supported: {', '.join(AUTOENCODERS)}")
    import diffusers  # slow, and training does not need it

    return getattr(diffusers, name)


def traits(vae: nn.Module) -> Autoencoder:
    return AUTOENCODERS[type(vae).__name__]


def patch(vae: nn.Module) -> int:
    """Side of the squares of pixels that Wan 2.2's autoencoder takes as channels; 1 for others."""
    return vae.config.get("patch_size") or 1


def image_channels(vae: nn.Module) -> int:
    return vae.config[traits(vae).image_channels] // patch(vae) ** 2


def latent_channels(vae: nn.Module) -> int:
    return vae.config.get("vq_embed_dim") or vae.config[traits(vae).latent_channels]


def reduction(vae: nn.Module) -> int:
    """Pixels to a latent, along each side."""
    return patch(vae) * 2 ** (len(vae.config[traits(vae).resolutions]) - 1)


def encode_images(vae: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``(B, C, h, w)`` of the latents of images ``(B, C, H, W)``; 0 where there is but one."""
    encoded = vae.encode(images[:, :, None] if traits(vae).video else images)
    if "latent_dist" not in encoded:
        return encoded[0], torch.zeros_like(encoded[0])
    mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
    return (mean[:, :, 0], std[:, :, 0]) if traits(vae).video else (mean, std)


def decode_latents(vae: nn.Module, z: Tensor) -> Tensor:
    """Images ``(B, C, H, W)``, not clamped by all of them, of latents ``(B, C, h, w)``."""
    if traits(vae).video:
        return vae.decode(z[:, :, None]).sample[:, :, 0]
    return vae.decode(z).sample
