"""The ADM U-Net of Dhariwal and Nichol (arXiv 2105.05233) as used by EDM (arXiv 2206.00364) for ImageNet-64.

Tensor names and constructor defaults are those of the released ``edm-imagenet-64x64-cond-adm``. The code is our own.
"""

import math

import torch
from torch import Tensor, nn

from teachers.networks.layers import PositionalEmbedding, silu, unrounded
from teachers.networks.song_unet import Conv2d, Linear, UNetBlock, group_norm
from teachers.networks.unet_plan import unet_plan


class DhariwalUNet(nn.Module):
    """ADM U-Net: ``forward(x, noise_labels, class_labels=None, guidance=None) -> (B, out_channels, H, W)``.

    Args:
        img_resolution: height and width of the input.
        label_dim: number of classes, 0 for an unconditional network. Class labels are one-hot ``(B, label_dim)``;
            all zeros is the null class.
        augment_dim, label_dropout, guidance_embedding: as in :class:`teachers.networks.song_unet.SongUNet`.
    """

    def __init__(
        self, img_resolution, in_channels, out_channels, label_dim=0, augment_dim=0, model_channels=192,
        channel_mult=(1, 2, 3, 4), channel_mult_emb=4, num_blocks=3, attn_resolutions=(32, 16, 8), dropout=0.10,
        label_dropout=0.0, guidance_embedding=False,
    ):  # fmt: skip
        super().__init__()
        self.stride = 2 ** (len(channel_mult) - 1)
        if img_resolution % self.stride:
            raise ValueError(f"img_resolution {img_resolution} is not a multiple of {self.stride}, its downsampling")
        self.label_dim = label_dim
        self.null_class = label_dropout > 0
        emb_channels = model_channels * channel_mult_emb
        block = dict(
            emb_channels=emb_channels, dropout=dropout, channels_per_head=64, adaptive_scale=True, skip_scale=1.0, eps=1e-5,
            resample_proj=False,
        )  # fmt: skip

        self.map_noise = PositionalEmbedding(model_channels)
        if augment_dim:
            self.map_augment = Linear(augment_dim, model_channels, bias=False, init_scale=0.0)
            self.map_augment.requires_grad_(False)  # sees zeros only
        self.guidance_embedding = guidance_embedding
        if guidance_embedding:
            self.map_guidance = Linear(model_channels, model_channels, bias=False, init_scale=0.0)
        self.map_layer0 = Linear(model_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)
        if label_dim:
            self.map_label = Linear(
                label_dim, emb_channels, bias=False, init="kaiming_normal", init_scale=math.sqrt(label_dim)
            )

        widths = [model_channels * mult for mult in channel_mult]
        encoder, decoder = unet_plan(img_resolution, in_channels, widths[0], widths, num_blocks)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        for place in encoder:
            if place.kind == "conv":
                self.enc[place.name] = Conv2d(place.cin, place.cout, kernel=3)
                continue
            attention = place.kind == "block" and place.resolution in attn_resolutions
            down = place.kind == "down"
            self.enc[place.name] = UNetBlock(place.cin, place.cout, down=down, attention=attention, **block)
        for place in decoder:
            attention = place.kind == "in0" or (place.kind == "block" and place.resolution in attn_resolutions)
            up = place.kind == "up"
            self.dec[place.name] = UNetBlock(place.cin, place.cout, up=up, attention=attention, **block)
        self.out_norm = group_norm(widths[0], eps=1e-5)
        self.out_conv = Conv2d(widths[0], out_channels, kernel=3, init_scale=0.0)

    def embed(self, noise_labels, class_labels, guidance) -> Tensor:
        emb = self.map_noise(noise_labels)
        if self.guidance_embedding and guidance is not None:
            emb = emb + self.map_guidance(self.map_noise(guidance))
        emb = self.map_layer1(silu(self.map_layer0(emb)))
        if self.label_dim and class_labels is not None:
            emb = emb + self.map_label(class_labels.to(emb.dtype))
        return silu(emb)

    def forward(self, x: Tensor, noise_labels: Tensor, class_labels=None, guidance=None) -> Tensor:
        if x.shape[-2] % self.stride or x.shape[-1] % self.stride:
            raise ValueError(f"height and width must be multiples of {self.stride}, got {tuple(x.shape[-2:])}")
        # The time path stays in fp32 or better: its derivative is lost in bf16.
        with torch.autocast(x.device.type, enabled=False):
            emb = self.embed(noise_labels, class_labels, guidance)
        skips = []
        for name, layer in self.enc.items():
            x = unrounded(layer, x) if name.endswith("_conv") else layer(x, emb)
            skips.append(x)
        for name, layer in self.dec.items():
            x = layer(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
        return unrounded(self.out_conv, silu(self.out_norm(x)))
