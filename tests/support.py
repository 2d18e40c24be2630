"""What tests of several files build on: tiny networks of diffusers, a network of texts, a Python without this package, and
files of users."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

UNET2D = dict(
    sample_size=8, in_channels=3, out_channels=3, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=8,
)  # fmt: skip
DIT = dict(
    sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=2, num_attention_heads=2,
    attention_head_dim=16, num_embeds_ada_norm=5,
)  # fmt: skip


class TextNetwork(nn.Module):
    """A tiny network of texts: the mean token, the pooled embedding and the time shift the sample.

    Args:
        size: values of a sample.
        tokens, width, pooled: of ``encoder_hidden_states`` and ``pooled_projections``.
        mask: whether it takes an ``encoder_attention_mask``.
    """

    def __init__(self, size: int, tokens: int, width: int, pooled: int, mask: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.text_condition = {"encoder_hidden_states": (tokens, width), "pooled_projections": (pooled,)}
        if mask:
            self.text_condition["encoder_attention_mask"] = (tokens,)
        self.text, self.pooled, self.mix = nn.Linear(width, size), nn.Linear(pooled, size), nn.Linear(size, size)

    def forward(self, x, time, text):
        tokens = text["encoder_hidden_states"]
        mask = text.get("encoder_attention_mask", torch.ones_like(tokens[..., 0])).to(x.dtype)[..., None]
        mean = (tokens * mask).sum(1) / mask.sum(1)
        shift = self.text(mean) + self.pooled(text["pooled_projections"]) + time.to(x.dtype)[:, None]
        return self.mix(x.flatten(1) + torch.tanh(shift)).view_as(x)


# The beginning of a script that finds of all our dependencies only torch and diffusers.
ONLY_DIFFUSERS = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from importlib.util import find_spec
ABSENT = ("distill", "teachers", "accelerate", "datasets", "einops", "matplotlib", "peft", "scipy", "transformers")
class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else super().find_spec(name, path, target)
sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Bare]
assert not any(map(find_spec, ABSENT))
import torch
from diffusers import DiffusionPipeline
"""


def import_file(path: Path) -> ModuleType:
    """A file as a module under its own name, as ``import`` makes it where its folder is on the path; always anew."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def graph(x: torch.Tensor) -> set[str]:
    """The names of the operations that ``x`` was made by and that a backward pass would go through."""
    nodes, names = [x.grad_fn], set()
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes += [child for child, _ in node.next_functions if child is not None]
    return names


class ExactGaussian(nn.Module):
    """TrigFlow network of ``N(0, s^2)`` data for ``sigma_data`` 0.5, ``s`` to be learned: the velocity, or the exact
    consistency function.
    """

    def __init__(self, consistency: bool, s: float = 0.3):
        super().__init__()
        self.consistency, self.s = consistency, nn.Parameter(torch.tensor(s, dtype=torch.float64))

    def forward(self, x, time):
        sd, t = 0.5, time.view(-1, 1, 1, 1)
        x_t = x * sd
        variance = (self.s * t.cos()).square() + (sd * t.sin()).square()
        if self.consistency:
            return (t.cos() * x_t - self.s * x_t / variance.sqrt()) / (t.sin() * sd)
        return (sd**2 - self.s**2) * t.sin() * t.cos() * x_t / (variance * sd)
