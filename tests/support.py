"""What tests of several files build on: tiny networks of diffusers, and a Python without this package."""

UNET2D = dict(
    sample_size=8, in_channels=3, out_channels=3, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=8,
)  # fmt: skip
DIT = dict(
    sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=2, num_attention_heads=2,
    attention_head_dim=16, num_embeds_ada_norm=5,
)  # fmt: skip

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
