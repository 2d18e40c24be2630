"""LightningDiT (arXiv 2501.01423): a diffusion transformer with SwiGLU, RMS normalisation and rotary positions.

Tensor names and constructor defaults are those of the released checkpoints: SiT's, with ``blocks.N.{norm1,norm2}``,
``blocks.N.mlp.{w12,w3}``, ``final_layer.norm_final`` and ``feat_rope.{freqs_cos,freqs_sin}``. The code is our own.
"""

import torch
from torch import Tensor, nn

from teachers.networks.layers import DualLinear, silu
from teachers.networks.sit import Attention, DiffusionTransformer, Mlp, Modulation, RMSNorm


class SwiGLU(nn.Module):
    """``w3(silu(a) * b)`` with ``[a, b] = w12(x)`` (arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w12 = DualLinear(dim, 2 * hidden)
        self.w3 = DualLinear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(silu(a) * b)


class RotaryEmbedding(nn.Module):
    """Turns neighbouring channels ``(2i, 2i + 1)`` by ``position * 10000^(-i / (head_dim / 4))`` (arXiv 2104.09864).

    The row of the token is the position for the first half of the channels, its column for the second.
    """

    def __init__(self, head_dim: int, grid: int):
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"rotary positions need a multiple of 4 channels per head, got {head_dim}")
        speeds = 10_000 ** -(torch.arange(head_dim // 4) / (head_dim // 4))
        axis = torch.arange(grid)[:, None] * speeds.repeat_interleave(2)
        rows, columns = axis[:, None].expand(-1, grid, -1), axis[None].expand(grid, -1, -1)
        angles = torch.cat([rows, columns], dim=2).reshape(grid**2, head_dim)
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``(B, heads, tokens, head_dim)``, turned, in fp32 or better."""
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        quarter_turned = torch.stack([-odd, even], dim=-1).flatten(-2)
        return x * self.freqs_cos + quarter_turned * self.freqs_sin


def lightning_norm(dim: int, rms: bool) -> nn.Module:
    return RMSNorm(dim) if rms else nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)


class LightningBlock(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, qk_norm: bool, swiglu: bool, rms: bool, wo_shift: bool
    ):
        super().__init__()
        self.norm1 = lightning_norm(dim, rms)
        self.attn = Attention(dim, num_heads, qk_norm, RMSNorm if rms else nn.LayerNorm)
        self.norm2 = lightning_norm(dim, rms)
        hidden = int(dim * mlp_ratio)
        self.mlp = SwiGLU(dim, int(2 / 3 * hidden)) if swiglu else Mlp(dim, hidden)
        self.wo_shift = wo_shift
        self.adaLN_modulation = Modulation(dim, (4 if wo_shift else 6) * dim)

    def forward(self, x: Tensor, c: Tensor, rope: nn.Module | None) -> Tensor:
        parts = self.adaLN_modulation(c)[:, None].chunk(4 if self.wo_shift else 6, dim=-1)
        if self.wo_shift:
            parts = (0, *parts[:2], 0, *parts[2:])
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        x = x + gate_a * self.attn(self.norm1(x) * (1 + scale_a) + shift_a, rope)
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)


class LightningFinalLayer(nn.Module):
    def __init__(self, dim: int, out_features: int, rms: bool):
        super().__init__()
        self.norm_final = lightning_norm(dim, rms)
        self.linear = DualLinear(dim, out_features)
        self.adaLN_modulation = Modulation(dim, 2 * dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class LightningDiT(DiffusionTransformer):
    """Diffusion transformer: ``forward(x, t, y=None, guidance=None) -> (B, in_channels, H, W)``.

    Args:
        input_size, num_classes, learn_sigma, guidance_embedding: as for :class:`teachers.networks.sit.SiT`.
        use_qknorm: normalises queries and keys, by RMS with ``use_rmsnorm`` and by layer norm without.
        use_swiglu: SwiGLU of two thirds of the width in place of the MLP.
        use_rope: rotary positions in the attention, besides the position table at the input.
        use_rmsnorm: RMS normalisation with learned scales in place of layer norm without.
        wo_shift: blocks are modulated by scales and gates alone.
    """

    def __init__(
        self, input_size=32, patch_size=2, in_channels=32, hidden_size=1152, depth=28, num_heads=16, mlp_ratio=4.0,
        class_dropout_prob=0.1, num_classes=1000, learn_sigma=False, use_qknorm=False, use_swiglu=False, use_rope=False,
        use_rmsnorm=False, wo_shift=False, guidance_embedding=False,
    ):  # fmt: skip
        super().__init__(
            input_size, patch_size, in_channels, hidden_size, num_heads, class_dropout_prob, num_classes, learn_sigma,
            guidance_embedding,
        )  # fmt: skip
        self.feat_rope = RotaryEmbedding(hidden_size // num_heads, self.grid) if use_rope else None
        options = (mlp_ratio, use_qknorm, use_swiglu, use_rmsnorm, wo_shift)
        self.blocks = nn.ModuleList([LightningBlock(hidden_size, num_heads, *options) for _ in range(depth)])
        self.final_layer = LightningFinalLayer(hidden_size, patch_size**2 * self.out_channels, use_rmsnorm)
        self.initialize_weights()

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, c, self.feat_rope)
        return x
