"""The U-Net of OpenAI's guided-diffusion (arXiv 2105.05233) in the form of its EDM teachers for consistency models
(arXiv 2303.01469).

Tensor names are those of the released ``edm_imagenet64_ema.pt``, ``edm_bedroom256_ema.pt`` and ``edm_cat256_ema.pt``, the
constructor's arguments those of OpenAI's training scripts, and its defaults the values for ImageNet-64. The code is our own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teachers.networks.layers import (
    GroupNorm,
    PositionalEmbedding,
    SiLU,
    attend,
    conv2d,
    unrounded,
    unrounded_value,
    upsample_nearest,
)
from teachers.networks.song_unet import Conv2d, Linear
from teachers.networks.unet_plan import unet_plan


class PointwiseConv(Conv2d):
    """1x1 convolution; with ``one_dimensional`` its weights are stored as ``(out, in, 1)``."""

    def __init__(self, in_channels, out_channels, one_dimensional, init_scale=1.0):
        super().__init__(in_channels, out_channels, kernel=1, init_scale=init_scale)
        if one_dimensional:
            self.weight = nn.Parameter(self.weight.data[..., 0])

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight.view(self.out_channels, self.in_channels, 1, 1), self.bias, padding=0)


def halve_or_double(x: Tensor, resample: str | None) -> Tensor:
    """``x`` at half (``"down"``) or twice (``"up"``) its resolution, or itself."""
    if resample == "down":
        return F.avg_pool2d(x, 2)
    return upsample_nearest(x) if resample == "up" else x


class OpenAIResBlock(nn.Module):
    """Residual block: norm, SiLU, resampling, conv; the time as a shift before the second norm or, with ``scale_shift``, as
    a scale and a shift after it; SiLU, dropout, conv. With ``exact`` autocast does not round the convolutions
    where a derivative along the PF-ODE is taken.
    """

    def __init__(self, in_channels, out_channels, emb_channels, dropout, scale_shift, resample=None, exact=False):
        super().__init__()
        self.scale_shift, self.resample, self.exact = scale_shift, resample, exact
        self.in_layers = nn.Sequential(GroupNorm(32, in_channels), SiLU(), Conv2d(in_channels, out_channels, kernel=3))
        self.emb_layers = nn.Sequential(SiLU(), Linear(emb_channels, out_channels * (2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(
            GroupNorm(32, out_channels), SiLU(), nn.Dropout(float(dropout)),
            Conv2d(out_channels, out_channels, kernel=3, init_scale=0.0),
        )  # fmt: skip
        self.skip_connection = nn.Identity()
        if in_channels != out_channels:
            self.skip_connection = Conv2d(in_channels, out_channels, kernel=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, silu, conv = self.in_layers
        y = self.convolve(conv, halve_or_double(silu(norm(x)), self.resample))
        norm, silu, dropout, conv = self.out_layers
        with torch.autocast(x.device.type, enabled=False):  # the time path, whatever the precision of the rest
            parameters = self.emb_layers(emb)[:, :, None, None].to(norm.weight.dtype)
            if self.scale_shift:
                scale, shift = parameters.chunk(2, dim=1)
                y = norm(y) * (1 + scale) + shift
            else:
                y = norm(y + parameters)
        y = self.convolve(conv, dropout(silu(y)))
        x = halve_or_double(x, self.resample)
        return y + (x if isinstance(self.skip_connection, nn.Identity) else unrounded(self.skip_connection, x))

    def convolve(self, layer: Conv2d, x: Tensor) -> Tensor:
        return unrounded_value(layer, x) if self.exact else layer(x)


class OpenAIAttention(nn.Module):
    """Self-attention on what it adds to; the order of the 3C outputs of ``qkv`` is ``(3, heads, C / heads)``, or ``(heads,
    3, C / heads)`` with ``legacy``.
    """

    def __init__(self, channels, channels_per_head, legacy):
        super().__init__()
        if channels % channels_per_head:
            raise ValueError(f"{channels} channels of attention are not a multiple of num_head_channels {channels_per_head}")
        self.num_heads, self.legacy = channels // channels_per_head, legacy
        self.norm = GroupNorm(32, channels)
        self.qkv = PointwiseConv(channels, 3 * channels, one_dimensional=legacy)
        self.proj_out = PointwiseConv(channels, channels, one_dimensional=legacy, init_scale=0.0)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv, shape = unrounded(self.qkv, self.norm(x)), (c // self.num_heads, h * w)
        if self.legacy:
            parts = qkv.reshape(b, self.num_heads, 3, *shape).unbind(2)
        else:
            parts = qkv.reshape(b, 3, self.num_heads, *shape).unbind(1)
        y = attend(*(part.transpose(-1, -2) for part in parts))
        return x + unrounded(self.proj_out, y.transpose(-1, -2).reshape(b, c, h, w))


class OpenAIResample(nn.Module):
    """Halves or doubles the resolution with a convolution, in networks without ``resblock_updown``."""

    def __init__(self, channels, resample):
        super().__init__()
        if resample == "down":
            self.op = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1)
        else:
            self.conv = Conv2d(channels, channels, kernel=3)

    def forward(self, x: Tensor) -> Tensor:
        return unrounded(self.op, x) if hasattr(self, "op") else self.conv(halve_or_double(x, "up"))


class OpenAIUNet(nn.Module):
    """OpenAI's U-Net: ``forward(x, timesteps, labels=None) -> (B, out_channels, H, W)``.

    It has no null class, having been trained without dropped labels.

    Args:
        image_size: height and width of the input.
        num_channels: width of the first level; ``channel_mult`` are the widths of all levels in these units.
        num_res_blocks: residual blocks a level.
        attention_resolutions: those with attention, which the bottom has in any case.
        num_classes: ``None`` for an unconditional network. Class labels are integers ``(B,)``.
        use_scale_shift_norm: the time scales and shifts after the norms (ImageNet-64), or it shifts before them (LSUN).
        resblock_updown: resampling is part of residual blocks; otherwise of strided or plain convolutions.
        legacy_attention: of guided-diffusion, with heads before queries, keys and values and 1-D convolutions.
            consistency_models has 2-D convolutions and splits them first.
    """

    def __init__(
        self, image_size, in_channels=3, out_channels=3, num_channels=192, num_res_blocks=3, channel_mult=(1, 2, 3, 4),
        attention_resolutions=(32, 16, 8), num_head_channels=64, num_classes=None, dropout=0.1, use_scale_shift_norm=True,
        resblock_updown=True, legacy_attention=False,
    ):  # fmt: skip
        super().__init__()
        self.stride = 2 ** (len(channel_mult) - 1)
        if image_size % self.stride:
            raise ValueError(f"image_size {image_size} is not a multiple of {self.stride}, its downsampling")
        self.null_class = False
        emb_channels = 4 * num_channels
        res = dict(emb_channels=emb_channels, dropout=dropout, scale_shift=use_scale_shift_norm)
        attention = dict(channels_per_head=num_head_channels, legacy=legacy_attention)

        self.map_time = PositionalEmbedding(num_channels)
        self.time_embed = nn.Sequential(Linear(num_channels, emb_channels), SiLU(), Linear(emb_channels, emb_channels))
        self.label_emb = nn.Embedding(num_classes, emb_channels) if num_classes else None

        # Every later layer amplifies what is rounded in the encoder. Its convolutions in bf16, a quarter of the work, take
        # the derivative's error from 0.8 % to 2.5 %.
        def resampling(channels: int, resample: str) -> nn.Module:
            if resblock_updown:
                return OpenAIResBlock(channels, channels, **res, resample=resample, exact=resample == "down")
            return OpenAIResample(channels, resample)

        def block(place, exact: bool) -> list[nn.Module]:
            layers = [OpenAIResBlock(place.cin, place.cout, **res, exact=exact)]
            if place.resolution in attention_resolutions:
                layers.append(OpenAIAttention(place.cout, **attention))
            return layers

        widths = [int(num_channels * mult) for mult in channel_mult]
        encoder, decoder = unet_plan(image_size, in_channels, widths[0], widths, num_res_blocks)
        self.input_blocks, self.output_blocks = nn.ModuleList(), nn.ModuleList()
        for place in encoder:
            if place.kind == "conv":
                layers = [Conv2d(place.cin, place.cout, kernel=3)]
            else:
                layers = [resampling(place.cout, "down")] if place.kind == "down" else block(place, exact=True)
            self.input_blocks.append(nn.ModuleList(layers))
        ends = [OpenAIResBlock(widths[-1], widths[-1], **res) for _ in range(2)]
        self.middle_block = nn.ModuleList([ends[0], OpenAIAttention(widths[-1], **attention), ends[1]])
        for place in decoder:
            if place.kind == "up":  # part of the block before
                self.output_blocks[-1].append(resampling(place.cout, "up"))
            elif place.kind == "block":
                self.output_blocks.append(nn.ModuleList(block(place, exact=False)))
        self.out = nn.Sequential(
            GroupNorm(32, widths[0]), SiLU(), Conv2d(widths[0], out_channels, kernel=3, init_scale=0.0)
        )

    def embed(self, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        emb = self.time_embed(self.map_time(timesteps))
        return emb if self.label_emb is None else emb + self.label_emb(labels).to(emb.dtype)

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        if x.shape[-2] % self.stride or x.shape[-1] % self.stride:
            raise ValueError(f"height and width must be multiples of {self.stride}, got {tuple(x.shape[-2:])}")
        if self.label_emb is not None and labels is None:
            raise ValueError("this network is class-conditional, without a null class: it needs labels")
        # The time path stays in fp32 or better: its derivative is lost in bf16.
        with torch.autocast(x.device.type, enabled=False):
            emb = self.embed(timesteps, labels)
        skips = []
        for layers in self.input_blocks:
            x = apply_layers(layers, x, emb)
            skips.append(x)
        x = apply_layers(self.middle_block, x, emb)
        for layers in self.output_blocks:
            x = apply_layers(layers, torch.cat([x, skips.pop()], dim=1), emb)
        norm, silu, conv = self.out
        return unrounded(conv, silu(norm(x)))


def apply_layers(layers: nn.ModuleList, x: Tensor, emb: Tensor) -> Tensor:
    for layer in layers:
        if isinstance(layer, OpenAIResBlock):
            x = layer(x, emb)
        else:
            x = unrounded(layer, x) if isinstance(layer, Conv2d) else layer(x)
    return x
