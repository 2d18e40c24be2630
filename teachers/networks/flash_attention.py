"""Attention and its tangent in one Triton kernel, that of the package ``jvp_flash_attention``, for GPUs.

It computes what :func:`teachers.networks.layers.attend` computes, in one pass and without the chunks. A training asks for it
by ``tangent.flash_attention``.
"""

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

FLASH_HEAD_DIMS = (32, 64, 128, 256)
# The kernel works on blocks of up to this many tokens and reads past the end of what they do not divide.
FLASH_TOKENS = 128
# In fp32 its products would be rounded to TF32.
FLASH_DTYPES = (torch.bfloat16, torch.float16)

# Whether it is asked for, in a dictionary because torch.compile stops at a context variable.
FLASH_ATTENTION = {"wanted": False}


def flash_attention_is_installed() -> bool:
    """Whether the package and Triton, which it is written in, are there."""
    return all(importlib.util.find_spec(name) for name in ("jvp_flash_attention", "triton"))


@contextmanager
def flash_attention(use: bool = True) -> Iterator[None]:
    """Take derivatives of attention inside by the kernel, where it :func:`fits_flash_attention`."""
    before, FLASH_ATTENTION["wanted"] = FLASH_ATTENTION["wanted"], use
    try:
        yield
    finally:
        FLASH_ATTENTION["wanted"] = before


def fits_flash_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel is wanted and can attend between these, ``(B, heads, tokens, head_dim)``: self-attention in half
    precision, of a multiple of 128 tokens and one of :data:`FLASH_HEAD_DIMS`, with no graph for a backward pass.
    """
    if not FLASH_ATTENTION["wanted"] or torch.is_grad_enabled():
        return False
    same = q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype
    return same and q.dtype in FLASH_DTYPES and q.shape[3] in FLASH_HEAD_DIMS and q.shape[2] % FLASH_TOKENS == 0


def flash_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over dual tensors ``(B, heads, tokens, head_dim)``, scaled by ``head_dim ** -0.5``; a missing
    tangent is zero.
    """
    # By name: where diffusers reads an import in an exported pipeline's code, it asks its user to install the package.
    kernel = importlib.import_module("jvp_flash_attention.jvp_attention").JVPAttn
    return kernel.fwd_dual(*(with_tangent(x) for x in (q, k, v)))


def with_tangent(x: Tensor) -> Tensor:
    primal, tangent = fwAD.unpack_dual(x)
    return fwAD.make_dual(primal, torch.zeros_like(primal)) if tangent is None else x
