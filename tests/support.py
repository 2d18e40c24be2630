"""What tests of several files build on: tiny networks of diffusers, and a Python without this package, users' files."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

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
ABSENT = ("distill", "teachers", "accelerate", "datasets", "einops", "matplotlib", "scipy")
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
