"""Attention with its backward pass on a CPU: PyTorch's fused kernel against its plain operations, by number of tokens.

    OMP_NUM_THREADS=1 python benchmarks/attention_backward.py [--tokens 16 49 64 98 128 196 256] [--heads 4] [--head-dim 32]

Wall time of the fused kernel over that of plain operations, medians of turns; above 1 the plain ones are faster. This is
where ``MATH_TOKENS`` of :mod:`teachers.networks.layers` comes from.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def seconds(inputs: list[Tensor], kernel: SDPBackend) -> float:
    before = time.perf_counter()
    with sdpa_kernel(kernel):
        out = F.scaled_dot_product_attention(*inputs)
    torch.autograd.grad(out, inputs, torch.ones_like(out))
    return time.perf_counter() - before


def ratio(tokens: int, options: argparse.Namespace, dtype: torch.dtype) -> float:
    shape = (options.batch, options.heads, tokens, options.head_dim)
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
    kernels = SDPBackend.FLASH_ATTENTION, SDPBackend.MATH
    turns = [[seconds(inputs, kernel) for kernel in kernels] for _ in range(2 + options.turns)][2:]
    return statistics.median(fused / plain for fused, plain in turns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 49, 64, 98, 128, 196, 256])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    print("| tokens | bf16 | fp32 |\n|---|---|---|")
    for tokens in options.tokens:
        found = [ratio(tokens, options, dtype) for dtype in (torch.bfloat16, torch.float32)]
        print(f"| {tokens} | {found[0]:.2f} | {found[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
