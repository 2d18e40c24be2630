"""The Triton kernel needs a GPU, or Triton's interpreter:

pip install --no-deps triton==3.7.1 jvp_flash_attention==0.14.0
TRITON_INTERPRET=1 python -m pytest tests/teachers/test_flash_attention.py
"""

import os

import pytest
import torch

import teachers
from distill.jvp import check_jvp
from distill.recipe import parse_recipe
from distill.trainer import Trainer
from teachers.networks import build
from teachers.networks.flash_attention import (
    fits_flash_attention,
    flash_attend,
    flash_attention,
    flash_attention_is_installed,
)
from teachers.networks.layers import attend, attention_tangent

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HALF = torch.bfloat16 if CUDA else torch.float16  # the interpreter computes by NumPy, which has no bf16

kernel = pytest.mark.skipif(
    not flash_attention_is_installed() or not (CUDA or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs jvp_flash_attention, Triton, and a GPU or TRITON_INTERPRET=1",
)


def qkv(tokens=128, head_dim=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(2, 2, tokens, head_dim, generator=generator).to(DEVICE, dtype)  # noqa: E731
    return tuple(draw() for _ in range(3)), tuple(draw() for _ in range(3))


def relative(x, y):
    return ((x - y).norm() / y.norm()).item()


@kernel
@pytest.mark.filterwarnings("ignore:tl.make_block_ptr")
@pytest.mark.parametrize("tokens, head_dim", [(128, 32), (256, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_the_kernel_is_attention_with_its_tangent(tokens, head_dim, dtype):
    primals, tangents = qkv(tokens, head_dim, dtype)
    wide = [tuple(x.double() for x in xs) for xs in (primals, tangents)]
    with torch.no_grad():
        expected = torch.func.jvp(attend, *wide)
        tolerance = (1e-6 if not CUDA else 2e-3) if dtype == torch.float32 else 1e-2
        for got, exact in zip(torch.func.jvp(flash_attend, primals, tangents), expected, strict=True):
            assert got.dtype == dtype
            assert relative(got, exact) < tolerance


@kernel
@pytest.mark.filterwarnings("ignore:tl.make_block_ptr")
def test_attention_takes_it_only_where_asked(monkeypatch):
    chunked = []
    monkeypatch.setattr("teachers.networks.layers.attention_tangent", lambda *x: chunked.append(1) or attention_tangent(*x))
    primals, tangents = qkv(dtype=HALF)
    with torch.no_grad():
        exact = torch.func.jvp(attend, primals, tangents)
        assert len(chunked) == 1
        with flash_attention():
            got = torch.func.jvp(attend, primals, tangents)
            only_v = torch.func.jvp(lambda v: attend(*primals[:2], v), primals[2:], tangents[2:])[1]
    assert len(chunked) == 1
    for x, y in zip(got, exact, strict=True):
        assert relative(x.float(), y.float()) < 1e-2
    assert relative(only_v.float(), attend(*primals[:2], tangents[2]).float()) < 1e-2


def test_where_it_fits():
    (q, k, v), _ = qkv(dtype=torch.bfloat16)
    with torch.no_grad():
        assert not fits_flash_attention(q, k, v)
        with flash_attention():
            assert fits_flash_attention(q, k, v)
            assert not fits_flash_attention(q.float(), k.float(), v.float())  # rounded to TF32
            assert not fits_flash_attention(q, k[:, :, :64], v[:, :, :64])  # cross-attention
            assert not fits_flash_attention(*(x[..., :24] for x in (q, k, v)))  # head_dim
            assert not fits_flash_attention(*(x[:, :, :100] for x in (q, k, v)))  # blocks would reach past the end
            with flash_attention(False):
                assert not fits_flash_attention(q, k, v)
            with torch.enable_grad():
                assert not fits_flash_attention(q, k, v)  # a graph would be needed
    assert not fits_flash_attention(q, k, v)


FLASH = dict(
    objective="distillation", output_dir="x", sigma_data=0.5, max_train_steps=1, train_batch_size=4, sample_shape=[1, 8, 8],
    data={"source": "teacher"}, teacher="mnist-flow", mixed_precision="bf16", tangent={"flash_attention": True},
)  # fmt: skip


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mixed_precision": "no"}, "needs mixed_precision: bf16"),
        ({"objective": "vsd", "vsd": {}}, "belongs to the consistency objectives"),
        ({"tangent": {"flash_attention": True, "shared_primal": True}}, "does not go with tangent.shared_primal"),
        ({"compile": "inductor"}, "does not go with compile"),
        ({"discrete_steps": 16}, "does not go with discrete_steps"),
    ],
)
def test_recipes_that_cannot_use_it(changes, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe({**FLASH, **changes}, "test")


@pytest.mark.skipif(CUDA, reason="for machines without a GPU")
def test_it_needs_a_gpu():
    with pytest.raises(ValueError, match="tangent.flash_attention needs a GPU and its package"):
        Trainer(parse_recipe(FLASH, "test"))


@kernel
@pytest.mark.filterwarnings("ignore:tl.make_block_ptr")
def test_the_derivative_of_a_network_by_it():
    torch.manual_seed(0)
    native = build("SiT", dict(
        input_size=16, patch_size=1, in_channels=1, hidden_size=64, depth=2, num_heads=2, num_classes=3, learn_sigma=False
    ))  # fmt: skip
    for p in native.parameters():
        p.data += 0.05 * torch.randn_like(p)
    network = teachers.wrap(native, teachers.RECTIFIED_FLOW, 0.5, (1, 16, 16), 3).eval().to(DEVICE)
    with torch.autocast(DEVICE, HALF):
        exact = check_jvp(network, tolerance=2e-2)
        with flash_attention():
            assert 0 < abs(check_jvp(network, tolerance=2e-2) - exact)  # another kernel rounds otherwise
