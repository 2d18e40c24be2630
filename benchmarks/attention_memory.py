"""Memory of the derivative along the PF-ODE by the number of tokens: linear, where PyTorch's own derivative is quadratic.

    python benchmarks/attention_memory.py [--tokens 256 1024 4096] [--heads 4] [--depth 2]

A small SiT, fp32, one sample, on the CPU. Counted are the bytes of all tensors that are alive at the same time in a JVP,
beside the weights, and the largest of them: with :func:`teachers.networks.layers.attend`, whose tangent works on chunks of
queries, and with attention in the one kernel that forward mode differentiates itself.
"""

import argparse
import math

import torch
import torch.nn.functional as F

from distill.jvp import jvp
from distill.plan.passes import LiveMemory
from teachers import RECTIFIED_FLOW, Teacher, wrap
from teachers.networks import build, sit


def network(tokens: int, heads: int, depth: int) -> Teacher:
    """A SiT whose samples have so many tokens."""
    size = math.isqrt(tokens)
    if size * size != tokens:
        raise SystemExit(f"--tokens must be square numbers, got {tokens}")
    config = {
        "input_size": 2 * size, "patch_size": 2, "in_channels": 4, "hidden_size": 32 * heads, "depth": depth,
        "num_heads": heads, "num_classes": 10, "learn_sigma": False,
    }  # fmt: skip
    return wrap(build("SiT", config), RECTIFIED_FLOW, 0.5, (4, 2 * size, 2 * size), 10).eval()


def derivative_memory(model: Teacher) -> int:
    """The most bytes alive in a JVP of one sample."""
    x, t, labels = torch.randn(1, *model.sample_shape), torch.ones(1), torch.zeros(1, dtype=torch.long)
    with LiveMemory([*model.parameters(), *model.buffers(), x, t]) as memory:
        jvp(lambda x, t: model(x, t, labels), (x, t), (x, t))
    return memory.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--depth", type=int, default=2)
    options = parser.parse_args()
    print("| tokens | attend (MiB) | PyTorch's derivative (MiB) |\n|---|---|---|")
    ours = sit.attend
    for tokens in options.tokens:
        model = network(tokens, options.heads, options.depth)
        found = []
        for attention in (ours, F.scaled_dot_product_attention):
            sit.attend = attention
            found.append(derivative_memory(model) / 2**20)
        print(f"| {tokens} | {found[0]:.1f} | {found[1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
