"""The magnitude-preserving U-Net of EDM2 (arXiv 2312.02696, configuration G).

Tensor names and constructor defaults are those of the released ``edm2-*`` checkpoints, without their prefix ``unet.``. The
code is our own.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teachers.networks.layers import PositionalEmbedding, TimeEmbedding, attend, conv2d, silu, unrounded, upsample_nearest
from teachers.networks.unet_plan import unet_plan


def normalize_magnitude(x: Tensor, dim: int | list[int], eps: float = 1e-4) -> Tensor:
    """``x`` over its root mean square along ``dim``, in fp32 or better."""
    wide = x if x.dtype == torch.float64 else x.float()
    norm = torch.linalg.vector_norm(wide, dim=dim, keepdim=True)
    return (wide / (eps + norm * math.sqrt(norm.numel() / wide.numel()))).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU at unit variance (equation 81)."""
    return silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """``(1 - t) a + t b`` at unit variance (equation 88)."""
    return a.lerp(b, t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Concatenation in which ``b`` contributes the share ``t`` (equation 103)."""
    total = math.sqrt(a.shape[1] + b.shape[1]) / math.hypot(1 - t, t)
    return torch.cat([a * (total * (1 - t) / math.sqrt(a.shape[1])), b * (total * t / math.sqrt(b.shape[1]))], dim=1)


class MPFourier(TimeEmbedding):
    """``sqrt(2) cos(w t + phase)`` with random frequencies and phases, fixed at initialisation and saved."""

    def __init__(self, dim: int, bandwidth: float = 1.0):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * bandwidth * torch.randn(dim))
        self.register_buffer("phases", 2 * math.pi * torch.rand(dim))

    def frequencies(self, device, dtype):
        return self.freqs.to(device, dtype)

    def forward(self, t: Tensor) -> Tensor:
        angles = self.angles(t)
        return (angles + self.phases.to(angles)).cos() * math.sqrt(2)


class MPConv(nn.Module):
    """Convolution, or with ``kernel=0`` a linear layer, whose weights count by their direction alone.

    Training keeps their magnitude at one with :meth:`normalize_weight` after each step, never inside ``forward``.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int):
        super().__init__()
        self.kernel = kernel
        shape = (out_channels, in_channels) + (kernel, kernel) * (kernel > 0)
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        dims = list(range(1, self.weight.ndim))
        w = normalize_magnitude(self.weight, dims) * (gain / math.sqrt(self.weight[0].numel()))
        if self.kernel:
            return conv2d(x, w, None, padding=self.kernel // 2)
        dtype = torch.promote_types(w.dtype, torch.float32)
        return F.linear(x.to(dtype), w.to(dtype))

    @torch.no_grad()
    def normalize_weight(self) -> None:
        self.weight.copy_(normalize_magnitude(self.weight, list(range(1, self.weight.ndim))))


class EDM2Block(nn.Module):
    """Residual block of the encoder (``enc``: the pixel norm first) or the decoder; then optional cosine attention."""

    def __init__(
        self, in_channels, out_channels, emb_channels, flavor, channels_per_head, dropout, res_balance, attn_balance,
        clip_act, resample=None, attention=False,
    ):  # fmt: skip
        super().__init__()
        self.flavor, self.resample, self.dropout, self.clip_act = flavor, resample, float(dropout), clip_act
        self.res_balance, self.attn_balance = res_balance, attn_balance
        self.num_heads = out_channels // channels_per_head if attention else 0
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(out_channels if flavor == "enc" else in_channels, out_channels, kernel=3)
        self.emb_linear = MPConv(emb_channels, out_channels, kernel=0)
        self.conv_res1 = MPConv(out_channels, out_channels, kernel=3)
        self.conv_skip = MPConv(in_channels, out_channels, kernel=1) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, out_channels * 3, kernel=1) if self.num_heads else None
        self.attn_proj = MPConv(out_channels, out_channels, kernel=1) if self.num_heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = upsample_nearest(x)
        # Only 3x3 convolutions between the blocks' ends are rounded under autocast: with the residual stream and the 1x1
        # convolutions of attention in bf16, the derivative's error is more than twice as large, up to 2 %.
        if self.flavor == "enc":
            x = normalize_magnitude(x if self.conv_skip is None else unrounded(self.conv_skip, x), dim=1)
        y = self.conv_res0(mp_silu(x))
        with torch.autocast(x.device.type, enabled=False):  # the time path, whatever the precision of the rest
            scale = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = mp_silu(y * scale[:, :, None, None].to(x.dtype))
        y = self.conv_res1(F.dropout(y, self.dropout, self.training))
        if self.flavor == "dec" and self.conv_skip is not None:
            x = unrounded(self.conv_skip, x)
        x = mp_sum(x, y.to(x.dtype), self.res_balance)
        if self.num_heads:
            x = mp_sum(x, self.attention(x).to(x.dtype), self.attn_balance)
        return x if self.clip_act is None else x.clamp(-self.clip_act, self.clip_act)

    def attention(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        # Released weights order the 3C outputs as (heads, C / heads, 3).
        qkv = unrounded(self.attn_qkv, x).reshape(b, self.num_heads, c // self.num_heads, 3, h * w)
        q, k, v = (part.transpose(-1, -2) for part in normalize_magnitude(qkv, dim=2).unbind(3))
        return unrounded(self.attn_proj, attend(q, k, v).transpose(-1, -2).reshape(b, c, h, w))


class EDM2UNet(nn.Module):
    """EDM2 U-Net: ``forward(x, noise_labels, class_labels=None, guidance=None) -> (B, img_channels, H, W)``.

    Args:
        img_resolution: height and width of the input.
        label_dim: number of classes, 0 for an unconditional network. Class labels are one-hot ``(B, label_dim)``;
            all zeros is the null class.
        label_dropout: as the network was trained; with 0 (every released one) it has no null class.
        guidance_embedding: adds an input ``guidance`` ``(B,)``: the guidance scale a student was asked for, by a positional
            embedding and a zero-initialised layer (sCM, section 5.2).
    """

    def __init__(
        self, img_resolution, img_channels, label_dim=0, model_channels=192, channel_mult=(1, 2, 3, 4),
        channel_mult_noise=None, channel_mult_emb=None, num_blocks=3, attn_resolutions=(16, 8), label_balance=0.5,
        concat_balance=0.5, channels_per_head=64, dropout=0.0, res_balance=0.3, attn_balance=0.3, clip_act=256.0,
        label_dropout=0.0, guidance_embedding=False,
    ):  # fmt: skip
        super().__init__()
        block = dict(
            channels_per_head=channels_per_head, dropout=dropout, res_balance=res_balance, attn_balance=attn_balance,
            clip_act=clip_act,
        )  # fmt: skip
        self.stride = 2 ** (len(channel_mult) - 1)
        if img_resolution % self.stride:
            raise ValueError(f"img_resolution {img_resolution} is not a multiple of {self.stride}, its downsampling")
        self.label_dim, self.label_balance, self.concat_balance = label_dim, label_balance, concat_balance
        self.null_class = label_dropout > 0
        widths = [model_channels * mult for mult in channel_mult]
        noise_channels = widths[0] if channel_mult_noise is None else model_channels * channel_mult_noise
        emb_channels = max(widths) if channel_mult_emb is None else model_channels * channel_mult_emb

        self.emb_fourier = MPFourier(noise_channels)
        self.emb_noise = MPConv(noise_channels, emb_channels, kernel=0)
        self.emb_label = MPConv(label_dim, emb_channels, kernel=0) if label_dim else None
        self.guidance_embedding = guidance_embedding
        if guidance_embedding:
            self.map_guidance = PositionalEmbedding(noise_channels + noise_channels % 2)
            self.emb_guidance = nn.Linear(self.map_guidance.dim, emb_channels, bias=False)
            nn.init.zeros_(self.emb_guidance.weight)

        encoder, decoder = unet_plan(img_resolution, img_channels + 1, widths[0], widths, num_blocks)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        for stack, flavor, places in ((self.enc, "enc", encoder), (self.dec, "dec", decoder)):
            for place in places:
                if place.kind == "conv":
                    stack[place.name] = MPConv(place.cin, place.cout, kernel=3)
                    continue
                attention = place.kind == "in0" or (place.kind == "block" and place.resolution in attn_resolutions)
                resample = place.kind if place.kind in ("down", "up") else None
                stack[place.name] = EDM2Block(
                    place.cin, place.cout, emb_channels, flavor, **block, resample=resample, attention=attention
                )
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.out_conv = MPConv(widths[0], img_channels, kernel=3)

    def normalize_weights(self) -> None:
        """Bring every weight back to unit magnitude, after an optimizer step (forced weight normalisation, equation 66)."""
        for module in self.modules():
            if isinstance(module, MPConv):
                module.normalize_weight()

    def embed(self, noise_labels, class_labels, guidance) -> Tensor:
        emb = self.emb_noise(self.emb_fourier(noise_labels))
        if self.emb_label is not None:
            if class_labels is None:
                class_labels = emb.new_zeros(len(emb), self.label_dim)
            label = self.emb_label(class_labels.to(emb.dtype) * math.sqrt(self.label_dim))
            emb = mp_sum(emb, label, self.label_balance)
        if self.guidance_embedding and guidance is not None:
            emb = emb + self.emb_guidance(self.map_guidance(guidance).to(emb.dtype))
        return mp_silu(emb)

    def forward(self, x: Tensor, noise_labels: Tensor, class_labels=None, guidance=None) -> Tensor:
        if x.shape[-2] % self.stride or x.shape[-1] % self.stride:
            raise ValueError(f"height and width must be multiples of {self.stride}, got {tuple(x.shape[-2:])}")
        # The time path stays in fp32 or better: its derivative is lost in bf16.
        with torch.autocast(x.device.type, enabled=False):
            emb = self.embed(noise_labels, class_labels, guidance)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)  # in place of biases
        skips = []
        for name, layer in self.enc.items():
            x = unrounded(layer, x) if name.endswith("_conv") else layer(x, emb)
            skips.append(x)
        for name, layer in self.dec.items():
            x = layer(mp_cat(x, skips.pop(), self.concat_balance) if "_block" in name else x, emb)
        return unrounded(self.out_conv, x, gain=self.out_gain)
