"""A diffusion transformer in the manner of DiT (arXiv 2212.09748), SiT (arXiv 2401.08740) and REPA (arXiv 2410.06940).

Tensor names and constructor defaults are those of the released checkpoints (``x_embedder.proj``, ``t_embedder.mlp``,
``y_embedder.embedding_table``, ``blocks.N.{attn,mlp,adaLN_modulation}``, ``final_layer``), which DiT and SiT share, so
their state dicts load unchanged (REPA's without its ``projectors``). The code is our own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teachers.networks.layers import DualLinear, PositionalEmbedding, SiLU, TimeLinear, attend, pixel_norm


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256):
        super().__init__()
        self.frequencies = PositionalEmbedding(frequency_embedding_size)
        self.mlp = nn.Sequential(
            TimeLinear(frequency_embedding_size, hidden_size), SiLU(), TimeLinear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.frequencies(t))


class LabelEmbedder(nn.Module):
    """Class embedding; row ``num_classes`` is the null class when the network was trained with label dropout.

    Labels are dropped by the objective, not here.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return pixel_norm(x.float() if x.dtype != torch.float64 else x).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Self-attention with normalised queries and keys if ``qk_norm``, turned by ``rope`` if one is given."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool, norm: type[nn.Module] = RMSNorm):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = DualLinear(dim, dim * 3)
        self.q_norm = norm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = norm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = DualLinear(dim, dim)

    def forward(self, x: Tensor, rope: nn.Module | None = None) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope(q), rope(k)
        out = attend(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(out.transpose(1, 2).reshape(b, n, c))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = DualLinear(dim, hidden)
        self.fc2 = DualLinear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x: Tensor, shift: Tensor, scale: Tensor, double_norm: bool) -> Tensor:
    """AdaLN, or sCM's adaptive double normalisation (arXiv 2410.11081, section 4.1): both factors pixel-normalised."""
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    if double_norm:
        return x * pixel_norm(1 + scale)[:, None] + pixel_norm(shift)[:, None]
    return x * (1 + scale)[:, None] + shift[:, None]


class Modulation(nn.Sequential):
    """Shifts, scales and gates from the embedded time and class: the end of the time path, so autocast leaves it be."""

    def __init__(self, dim: int, out_features: int):
        super().__init__(SiLU(), DualLinear(dim, out_features))

    def forward(self, c: Tensor) -> Tensor:
        with torch.autocast(c.device.type, enabled=False):
            return super().forward(c)


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qk_norm: bool, double_norm: bool):
        super().__init__()
        self.double_norm = double_norm
        self.attn = Attention(dim, num_heads, qk_norm)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = Modulation(dim, 6 * dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a[:, None] * self.attn(modulate(x, shift_a, scale_a, self.double_norm))
        return x + gate_m[:, None] * self.mlp(modulate(x, shift_m, scale_m, self.double_norm))


class FinalLayer(nn.Module):
    def __init__(self, dim: int, out_features: int, double_norm: bool):
        super().__init__()
        self.double_norm = double_norm
        self.linear = DualLinear(dim, out_features)
        self.adaLN_modulation = Modulation(dim, 2 * dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(x, shift, scale, self.double_norm))


def sincos_position_embedding(dim: int, size: int) -> Tensor:
    """Fixed 2-D sine-cosine table ``(size * size, dim)``; the first half encodes the column, as in DiT."""
    omega = 1 / 10_000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(size, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    table = torch.cat([axis[None].expand(size, -1, -1), axis[:, None].expand(-1, size, -1)], dim=2)
    return table.reshape(size * size, dim).float()


class DiffusionTransformer(nn.Module):
    """What the diffusion transformers share: embeddings, position table and patches around their ``blocks``.

    ``forward(x, t, y=None, guidance=None) -> (B, in_channels, H, W)``. A subclass adds ``blocks`` and ``final_layer``,
    then calls ``initialize_weights``.
    """

    def __init__(
        self, input_size: int, patch_size: int, in_channels: int, hidden_size: int, num_heads: int,
        class_dropout_prob: float, num_classes: int, learn_sigma: bool, guidance_embedding: bool,
    ):  # fmt: skip
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"input_size {input_size} is not a multiple of patch_size {patch_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of 4 and of num_heads {num_heads}")
        self.in_channels, self.patch_size, self.grid = in_channels, patch_size, input_size // patch_size
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.num_classes = num_classes
        self.null_class = class_dropout_prob > 0
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob) if num_classes else None
        self.guidance_embedding = guidance_embedding
        self.g_embedder = TimestepEmbedder(hidden_size) if guidance_embedding else None
        table = sincos_position_embedding(hidden_size, self.grid)[None]
        self.pos_embed = nn.Parameter(table, requires_grad=False)

    def initialize_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for embedder in filter(None, (self.t_embedder, self.g_embedder)):
            nn.init.normal_(embedder.mlp[0].weight, std=0.02)
            nn.init.normal_(embedder.mlp[2].weight, std=0.02)
        if self.g_embedder is not None:
            nn.init.zeros_(self.g_embedder.mlp[2].weight)
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[-1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def embed(self, t: Tensor, y: Tensor | None, guidance: Tensor | None) -> Tensor:
        c = self.t_embedder(t)
        if self.y_embedder is not None:
            if y is None and not self.null_class:
                raise ValueError("this network was trained without label dropout, has no null class and needs labels")
            y = torch.full((len(t),), self.num_classes, device=t.device) if y is None else y
            c = c + self.y_embedder(y)
        if self.g_embedder is not None and guidance is not None:
            c = c + self.g_embedder(guidance)
        return c

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        # The time path stays in fp32 or better: its derivative is lost in bf16.
        with torch.autocast(x.device.type, enabled=False):
            c = self.embed(t, y, guidance)
        if x.shape[-2:] != (self.grid * self.patch_size,) * 2:
            raise ValueError(f"height and width must be {self.grid * self.patch_size}, got {tuple(x.shape[-2:])}")
        x = self.x_embedder(x) + self.pos_embed
        c = c.to(x.dtype)
        x = self.run_blocks(x, c)
        return self.unpatchify(self.final_layer(x, c))[:, : self.in_channels]

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens ``(B, N, hidden_size)`` through all blocks, under the condition ``c`` ``(B, hidden_size)``."""
        for block in self.blocks:
            x = block(x, c)
        return x

    def unpatchify(self, x: Tensor) -> Tensor:
        """``(B, tokens, patch_size^2 C)`` to ``(B, C, H, W)``; the channel varies fastest within a token."""
        b, g, p = len(x), self.grid, self.patch_size
        x = x.view(b, g, g, p, p, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(b, self.out_channels, g * p, g * p)


class SiT(DiffusionTransformer):
    """Diffusion transformer: ``forward(x, t, y=None, guidance=None) -> (B, in_channels, H, W)``.

    Args:
        input_size: height and width of the input, a multiple of ``patch_size``.
        num_classes: number of classes, 0 for an unconditional network; labels are integers, ``num_classes`` is null
            (its row exists if ``class_dropout_prob`` is positive).
        learn_sigma: the head has twice the channels and the second half is dropped, as in released DiT and SiT.
        qk_norm: RMS normalisation of queries and keys (arXiv 2302.05442).
        double_norm: adaptive double normalisation instead of AdaLN (arXiv 2410.11081, section 4.1).
        guidance_embedding: adds an input ``guidance`` ``(B,)``, embedded like the time and zero-initialised.
    """

    def __init__(
        self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16, mlp_ratio=4.0,
        class_dropout_prob=0.1, num_classes=1000, learn_sigma=True, qk_norm=False, double_norm=False,
        guidance_embedding=False,
    ):  # fmt: skip
        super().__init__(
            input_size, patch_size, in_channels, hidden_size, num_heads, class_dropout_prob, num_classes, learn_sigma,
            guidance_embedding,
        )  # fmt: skip
        self.blocks = nn.ModuleList(
            [Block(hidden_size, num_heads, mlp_ratio, qk_norm, double_norm) for _ in range(depth)]
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels, double_norm)
        self.initialize_weights()
