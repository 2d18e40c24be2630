"""A network of somebody else's: an MLP-mixer (arXiv 2105.01601) that learns the score of noisy MNIST digits."""

import torch
from torch import nn

import teachers


class MixerBlock(nn.Module):
    """Two MLPs, one across the patches and one across the channels."""

    def __init__(self, patches, dim):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.across = nn.Sequential(nn.Linear(patches, 2 * patches), nn.GELU(), nn.Linear(2 * patches, patches))
        self.within = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, condition):
        x = x + self.across((self.norm1(x) + condition).transpose(1, 2)).transpose(1, 2)
        return x + self.within(self.norm2(x) + condition)


@teachers.register
class MixerScore(nn.Module):
    """The score of ``x e^{-t/2} + sqrt(1 - e^{-t}) eps`` at times ``t`` ``(B,)`` and classes ``labels`` ``(B,)``."""

    null_class = False  # never trained without a label

    def __init__(self, size=28, patch=4, dim=64, depth=4, num_classes=10):
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
        """Sines and cosines of the logarithm of the noise-to-signal ratio."""
        angles = torch.expm1(t).log()[:, None] / 2 * torch.logspace(-1, 0, self.dim // 2).to(t)
        return torch.cat([angles.cos(), angles.sin()], 1)

    def forward(self, x, t, labels):
        b, p, s = len(x), self.patch, self.side
        patches = x.view(b, s, p, s, p).transpose(2, 3).reshape(b, s * s, p * p)
        condition = (self.time(self.embed(t)) + self.label(labels))[:, None]
        h = self.enter(patches) + self.position
        for block in self.blocks:
            h = block(h, condition)
        v = self.leave(h).view(b, s, s, p, p).transpose(2, 3).reshape(x.shape)
        return -x - v / torch.expm1(t).sqrt().view(-1, 1, 1, 1)  # of pure noise the score is -x
