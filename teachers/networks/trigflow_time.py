"""A smooth time embedding in place of a network's own: a positional one of the TrigFlow time (arXiv 2410.11081, 4.1)."""

import torch
from torch import Tensor, nn

from teachers.networks.layers import PositionalEmbedding, TimeEmbedding, TimeLinear


class TrigFlowTime(nn.Module):
    """A linear layer on a positional embedding of the time in radians: ``(B,)`` to ``(B, dim)``."""

    def __init__(self, dim: int, embedding_dim: int = 64):
        super().__init__()
        self.embedding = PositionalEmbedding(embedding_dim)
        self.linear = TimeLinear(embedding_dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        return self.linear(self.embedding(t))


def time_embeddings(network: nn.Module) -> dict[str, nn.Module]:
    """Every time embedding of a network by name: its own, or those that :func:`use_trigflow_time` put there."""
    smooth = {name: m for name, m in network.named_modules() if isinstance(m, TrigFlowTime)}
    own = {name: m for name, m in network.named_modules() if isinstance(m, TimeEmbedding) and not embeds_guidance(name)}
    return smooth or own


def embeds_guidance(name: str) -> bool:
    return "guidance" in name or "g_embedder" in name


def use_trigflow_time(network: nn.Module) -> None:
    """Replace every time embedding by a :class:`TrigFlowTime` of the same width; the network then takes times in radians.

    Raises:
        ValueError: a network without a time embedding.
    """
    found = time_embeddings(network)
    if not found:
        raise ValueError(f"{type(network).__name__} has no time embedding that could be replaced")
    for name, embedding in found.items():
        parent, _, child = name.rpartition(".")
        dim = embedding(torch.zeros(1)).shape[1]
        setattr(network.get_submodule(parent), child, TrigFlowTime(dim))
