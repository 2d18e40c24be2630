"""The DDPM++ and NCSN++ U-Nets of Song et al. (arXiv 2011.13456) as used by EDM (arXiv 2206.00364, appendix F).

Tensor names and constructor defaults are those of the released ``edm-*-vp`` and ``edm-*-ve`` checkpoints, so their state
dicts load unchanged. The code is our own.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teachers.networks.layers import (
    FourierEmbedding,
    GroupNorm,
    PositionalEmbedding,
    TimeLinear,
    attend,
    conv2d,
    dropout,
    fast_layout,
    scaled_sum,
    silu,
    unrounded,
    unrounded_value,
    upsample_nearest,
)
from teachers.networks.unet_plan import unet_plan

# A residual sum of two unit-variance branches keeps unit variance (EDM, appendix F).
SKIP_SCALE = math.sqrt(0.5)


def _uniform(shape, fan_in: int, fan_out: int, kind: str, scale: float) -> Tensor:
    """EDM's initialisers: Xavier or Kaiming uniform, times ``scale``."""
    fan = (fan_in + fan_out) / 2 if kind == "xavier_uniform" else fan_in
    return scale * math.sqrt(3 / fan) * (torch.rand(*shape) * 2 - 1)


class Linear(TimeLinear):
    def __init__(self, in_features, out_features, bias=True, init="xavier_uniform", init_scale=1.0):
        super().__init__(in_features, out_features, bias=bias)
        if init == "kaiming_normal":
            weight = torch.randn(out_features, in_features) * init_scale / math.sqrt(in_features)
        else:
            weight = _uniform((out_features, in_features), in_features, out_features, init, init_scale)
        self.weight.data.copy_(weight)
        if bias:
            self.bias.data.zero_()


class Conv2d(nn.Module):
    """Convolution with optional 2x resampling by a fixed separable filter; ``kernel=0`` resamples only.

    Resampling comes first; with ``fused`` a downsampling convolution filters its own result, without padding in between.
    """

    def __init__(
        self, in_channels, out_channels, kernel, up=False, down=False, resample_filter=(1, 1), init_scale=1.0,
        fused=False,
    ):  # fmt: skip
        super().__init__()
        self.fused = fused
        self.in_channels, self.out_channels, self.kernel = in_channels, out_channels, kernel
        self.up, self.down = up, down
        self.weight = self.bias = None
        if kernel:
            shape = (out_channels, in_channels, kernel, kernel)
            fans = in_channels * kernel**2, out_channels * kernel**2
            self.weight = nn.Parameter(_uniform(shape, *fans, "xavier_uniform", init_scale))
            self.bias = nn.Parameter(torch.zeros(out_channels))
        if len(resample_filter) % 2:
            raise ValueError(f"resample_filter needs an even number of taps, got {list(resample_filter)}")
        self.box = tuple(resample_filter) == (1, 1)
        taps = torch.as_tensor(resample_filter, dtype=torch.float32)
        taps = (taps.outer(taps) / taps.sum().square())[None, None]
        self.register_buffer("resample_filter", taps if up or down else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            taps = self.resample_filter.to(x.dtype).expand(self.out_channels, 1, -1, -1)
            x = conv2d(x, self.weight, self.bias, padding=self.kernel // 2 + (taps.shape[-1] - 1) // 2)
            return F.conv2d(x, taps, stride=2, groups=self.out_channels)
        if self.up or self.down:
            x = self.resample(x)
        if self.weight is not None:
            x = conv2d(x, self.weight, self.bias, padding=self.kernel // 2)
        return x

    def resample(self, x: Tensor) -> Tensor:
        if self.box:
            # What every released DDPM++ uses: pooling and repetition are the same map, much faster.
            return upsample_nearest(x) if self.up else F.avg_pool2d(x, 2)
        taps = self.resample_filter.to(x.dtype).expand(self.in_channels, 1, -1, -1)
        pad = (taps.shape[-1] - 1) // 2
        if self.up:
            return F.conv_transpose2d(x, 4 * taps, stride=2, padding=pad, groups=self.in_channels)
        return F.conv2d(x, taps, stride=2, padding=pad, groups=self.in_channels)


def group_norm(channels: int, eps: float = 1e-6) -> GroupNorm:
    return GroupNorm(min(32, channels // 4), channels, eps=eps)


class UNetBlock(nn.Module):
    """Residual block: norm, conv, time shift *before* the second norm, conv; then optional self-attention.

    Args:
        channels_per_head: of the attention; ``None``: one head.
        adaptive_scale: the time scales and shifts *after* the second norm instead (ADM, arXiv 2105.05233).
        skip_scale: factor on every residual sum.
        resample_proj: a skip connection that only resamples has a 1x1 convolution too.
        exact: autocast does not round the 3x3 convolutions where a derivative along the PF-ODE is taken.
    """

    def __init__(
        self, in_channels, out_channels, emb_channels, up=False, down=False, attention=False, dropout=0.0,
        resample_filter=(1, 1), channels_per_head=None, adaptive_scale=False, skip_scale=SKIP_SCALE, eps=1e-6,
        resample_proj=True, exact=False,
    ):  # fmt: skip
        super().__init__()
        self.num_heads = (out_channels // (channels_per_head or out_channels)) if attention else 0
        self.dropout, self.adaptive_scale, self.skip_scale = float(dropout), adaptive_scale, skip_scale
        self.exact = exact
        resample = dict(up=up, down=down, resample_filter=resample_filter)
        self.norm0 = group_norm(in_channels, eps)
        self.conv0 = Conv2d(in_channels, out_channels, kernel=3, **resample)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1))
        self.norm1 = group_norm(out_channels, eps)
        self.conv1 = Conv2d(out_channels, out_channels, kernel=3, init_scale=1e-5)
        self.skip = None
        if out_channels != in_channels or up or down:
            kernel = 1 if resample_proj or out_channels != in_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel=kernel, **resample)
        if attention:
            self.norm2 = group_norm(out_channels, eps)
            self.qkv = Conv2d(out_channels, out_channels * 3, kernel=1, init_scale=math.sqrt(0.2))
            self.proj = Conv2d(out_channels, out_channels, kernel=1, init_scale=1e-5)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        y = self.convolve(self.conv0, silu(self.norm0(x)))
        with torch.autocast(x.device.type, enabled=False):  # the time path, whatever the precision of the rest
            y = self.condition(y, self.affine(emb)[:, :, None, None].to(self.affine.weight.dtype))
        y = self.convolve(self.conv1, dropout(silu(y), self.dropout, self.training))
        # The residual stream and attention's 1x1 convolutions are a small share of the work; either, rounded to bf16, can
        # take the derivative's error past 2 %.
        x = scaled_sum(y, x if self.skip is None else unrounded(self.skip, x), self.skip_scale)
        if self.num_heads:
            x = scaled_sum(x, self.attention(self.norm2(x)), self.skip_scale)
        return x

    def convolve(self, layer: Conv2d, x: Tensor) -> Tensor:
        return unrounded_value(layer, x) if self.exact else layer(x)

    def condition(self, y: Tensor, parameters: Tensor) -> Tensor:
        if not self.adaptive_scale:
            return self.norm1(y + parameters)
        scale, shift = parameters.chunk(2, dim=1)
        return self.norm1(y) * (1 + scale) + shift

    def attention(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        # Released weights order the 3C outputs as (heads, C / heads, 3).
        qkv = unrounded(self.qkv, x).reshape(b, self.num_heads, c // self.num_heads, 3, h * w)
        q, k, v = (part.transpose(-1, -2) for part in qkv.unbind(3))
        return unrounded(self.proj, attend(q, k, v).transpose(-1, -2).reshape(b, c, h, w))


class SongUNet(nn.Module):
    """DDPM++ or NCSN++ U-Net: ``forward(x, noise_labels, class_labels=None) -> (B, out_channels, H, W)``.

    Args:
        img_resolution: height and width of the input.
        label_dim: number of classes, 0 for an unconditional network. Class labels are one-hot ``(B, label_dim)``;
            all zeros is the null class.
        augment_dim: width of EDM's augmentation labels; the tensor exists for released weights and sees zeros.
        label_dropout: as the network was trained; with 0 it has no null class. Labels are dropped by the objective, not by
            the network.
        embedding_type, encoder_type: ``"positional"`` and ``"standard"`` for DDPM++; ``"fourier"`` and ``"residual"`` for
            NCSN++, which also has ``channel_mult_noise=2`` and ``resample_filter=(1, 3, 3, 1)``.
        decoder_type: ``"standard"``, the only one that any released network has.
        guidance_embedding: adds an input ``guidance`` ``(B,)``: the guidance scale a student was asked for, embedded
            like the time and zero-initialised (sCM, section 5.2).
    """

    channels_last = True  # on a CPU, by fast_layout and fast_weights

    def __init__(
        self, img_resolution, in_channels, out_channels, label_dim=0, augment_dim=0, model_channels=128,
        channel_mult=(1, 2, 2, 2), channel_mult_emb=4, num_blocks=4, attn_resolutions=(16,), dropout=0.10,
        label_dropout=0.0, embedding_type="positional", channel_mult_noise=1, encoder_type="standard",
        decoder_type="standard", resample_filter=(1, 1), guidance_embedding=False,
    ):  # fmt: skip
        super().__init__()
        for key, value, allowed in (
            ("embedding_type", embedding_type, ("positional", "fourier")),
            ("encoder_type", encoder_type, ("standard", "residual")),
            ("decoder_type", decoder_type, ("standard",)),
        ):
            if value not in allowed:
                raise ValueError(f"{key} is {value!r}; allowed: {', '.join(allowed)}")
        self.stride = 2 ** (len(channel_mult) - 1)
        if img_resolution % self.stride:
            raise ValueError(f"img_resolution {img_resolution} is not a multiple of {self.stride}, its downsampling")
        self.label_dim = label_dim
        self.null_class = label_dropout > 0
        emb_channels, noise_channels = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        block = dict(emb_channels=emb_channels, dropout=dropout, resample_filter=resample_filter)

        fourier = embedding_type == "fourier"
        self.map_noise = FourierEmbedding(noise_channels) if fourier else PositionalEmbedding(noise_channels, endpoint=True)
        if label_dim:
            self.map_label = Linear(label_dim, noise_channels, init="kaiming_normal", init_scale=math.sqrt(label_dim))
        if augment_dim:
            self.map_augment = Linear(augment_dim, noise_channels, bias=False)
            self.map_augment.requires_grad_(False)  # sees zeros only
        self.guidance_embedding = guidance_embedding
        if guidance_embedding:
            self.map_guidance = Linear(noise_channels, emb_channels, bias=False, init_scale=0.0)
        self.map_layer0 = Linear(noise_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)

        widths = [model_channels * mult for mult in channel_mult]
        encoder, decoder = unet_plan(img_resolution, in_channels, model_channels, widths, num_blocks)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        aux_channels = in_channels
        for place in encoder:
            if place.kind == "conv":
                self.enc[place.name] = Conv2d(place.cin, place.cout, kernel=3)
                continue
            attention = place.kind == "block" and place.resolution in attn_resolutions
            down = place.kind == "down"
            # In a derivative every later layer amplifies what is rounded here: in bf16 the encoder's convolutions, about a
            # third of the work, take its error from 1.4 % past 2 %; their tangents alone, to 1.5 %
            # (the small network of tests/distill/test_jvp.py).
            self.enc[place.name] = UNetBlock(place.cin, place.cout, down=down, attention=attention, exact=True, **block)
            if down and encoder_type == "residual":
                self.enc[place.name.replace("down", "aux_residual")] = Conv2d(
                    aux_channels, place.cout, kernel=3, down=True, resample_filter=resample_filter, fused=True
                )
                aux_channels = place.cout
        for place in decoder:
            attention = place.kind == "in0" or (place.last and place.resolution in attn_resolutions)
            up = place.kind == "up"
            self.dec[place.name] = UNetBlock(place.cin, place.cout, up=up, attention=attention, **block)
        end = f"{img_resolution}x{img_resolution}_aux"
        self.dec[f"{end}_norm"] = group_norm(widths[0])
        self.dec[f"{end}_conv"] = Conv2d(widths[0], out_channels, kernel=3, init_scale=1e-5)

    def embed(self, noise_labels, class_labels, guidance) -> Tensor:
        emb = self.map_noise(noise_labels)
        emb = torch.cat(emb.chunk(2, dim=1)[::-1], dim=1)  # released weights expect [sin, cos]
        if self.label_dim and class_labels is not None:
            emb = emb + self.map_label(class_labels.to(emb.dtype) * math.sqrt(self.label_dim))
        elif self.label_dim:
            emb = emb + self.map_label.bias  # the null class
        emb = self.map_layer0(emb)
        if self.guidance_embedding and guidance is not None:
            # Here, and not with the label: noise_channels can be few, and what a scale does depends on both time and label.
            emb = emb + self.map_guidance(self.map_noise(guidance))
        return silu(self.map_layer1(silu(emb)))

    def forward(self, x: Tensor, noise_labels: Tensor, class_labels=None, guidance=None) -> Tensor:
        if x.shape[-2] % self.stride or x.shape[-1] % self.stride:
            raise ValueError(f"height and width must be multiples of {self.stride}, got {tuple(x.shape[-2:])}")
        # The time path stays in fp32 or better: its derivative is lost in bf16.
        with torch.autocast(x.device.type, enabled=False):
            emb = self.embed(noise_labels, class_labels, guidance)
        skips, pyramid = [], x
        for name, layer in self.enc.items():
            if name.endswith("_aux_residual"):
                x = skips[-1] = pyramid = scaled_sum(x, unrounded(layer, pyramid), SKIP_SCALE)
                continue
            x = fast_layout(unrounded(layer, x)) if name.endswith("_conv") else layer(x, emb)
            skips.append(x)
        for name, layer in self.dec.items():
            if name.endswith("aux_norm"):
                x = silu(layer(x))
            elif name.endswith("aux_conv"):
                x = unrounded(layer, x)
            else:
                x = layer(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
        return x
