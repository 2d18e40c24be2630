"""A network of somebody else's: an MLP-mixer (arXiv 2105.01601) that learns the score of noisy digits."""

import torch
from torch import nn

import teachers


class MixerBlock(nn.Module):
    """An MLP across the patches, then one across the channels; the condition shifts and scales what they see."""

    def __init__(self, patches, dim):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False) for _ in range(2))
        self.modulation = nn.Linear(dim, 4 * dim)
        self.across = nn.Sequential(nn.Linear(patches, 4 * patches), nn.GELU(), nn.Linear(4 * patches, patches))
        self.within = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, h, condition):
        scale1, shift1, scale2, shift2 = self.modulation(condition).chunk(4, -1)
        h = h + self.across((self.norm1(h) * (1 + scale1) + shift1).transpose(1, 2)).transpose(1, 2)
        return h + self.within(self.norm2(h) * (1 + scale2) + shift2)


@teachers.register
class MixerScore(nn.Module):
    """The score of ``x = e^{-t/2} x0 + sqrt(1 - e^{-t}) eps`` at times ``t`` ``(B,)`` and classes ``labels`` ``(B,)``."""

    null_class = False  # it was never trained without a label

    def __init__(self, size=28, patch=7, dim=128, depth=4, num_classes=10):
        super().__init__()
        self.patch, self.side, self.dim = patch, size // patch, dim
        patches = self.side**2
        self.enter = nn.Linear(patch**2, dim)
        self.position = nn.Parameter(0.02 * torch.randn(patches, dim))
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(num_classes, dim)
        self.blocks = nn.ModuleList(MixerBlock(patches, dim) for _ in range(depth))
        self.leave = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, patch**2))

    def embed(self, t):
        """Sines and cosines of the logarithm of the noise-to-signal ratio ``sqrt(e^t - 1)``."""
        angles = torch.expm1(t).log()[:, None] / 2 * torch.logspace(-1, 0, self.dim // 2).to(t)
        return torch.cat([angles.cos(), angles.sin()], 1)

    def forward(self, x, t, labels):
        b, p, s = len(x), self.patch, self.side
        condition = nn.functional.silu(self.time(self.embed(t)) + self.label(labels))[:, None]
        h = self.enter(x.view(b, s, p, s, p).transpose(2, 3).reshape(b, s * s, p * p)) + self.position
        for block in self.blocks:
            h = block(h, condition)
        v = self.leave(h).view(b, s, s, p, p).transpose(2, 3).reshape(x.shape)
        return -x - v / torch.expm1(t).sqrt().view(-1, 1, 1, 1)  # -x is the score of pure noise
