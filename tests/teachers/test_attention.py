import math

import pytest
import torch
import torch.nn.functional as F
from support import graph
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from distill.plan.passes import LiveMemory
from teachers.networks import layers
from teachers.networks.layers import attend, attention_tangent

SHAPE = (2, 3, 7, 5)  # no multiples of 8


def plain(q, k, v):
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) @ v


def primals_and_tangents(shape=SHAPE, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    q, k, v, *tangents = torch.randn(6, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return (3 * q, k, v), tuple(tangents)  # far from uniform weights


@pytest.fixture(params=[2**22, 8 * 7 * 7 * 4, 8 * 7 * 3, 8], ids=["whole", "four heads", "three queries", "one query"])
def scores_bytes(request, monkeypatch):
    monkeypatch.setitem(layers.SCORES_BYTES, "cpu", request.param)


@pytest.mark.parametrize("varied", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_the_tangent_is_that_of_plain_attention(scores_bytes, varied):
    primals, tangents = primals_and_tangents()

    def restricted(function):
        def call(*args):
            given = iter(args)
            return function(*(next(given) if i in varied else x for i, x in enumerate(primals)))

        return torch.func.jvp(call, tuple(primals[i] for i in varied), tuple(tangents[i] for i in varied))

    torch.testing.assert_close(restricted(attend), restricted(plain), rtol=1e-12, atol=1e-13)


def test_queries_and_keys_may_differ_in_number(scores_bytes):
    primals, tangents = primals_and_tangents()
    primals, tangents = ((x[0][:, :, :4], *x[1:]) for x in (primals, tangents))
    expected = torch.func.jvp(plain, tuple(primals), tuple(tangents))
    torch.testing.assert_close(torch.func.jvp(attend, tuple(primals), tuple(tangents)), expected)


def test_under_autocast_only_the_result_is_rounded():
    """Inputs in bf16, as their projections leave them: the tangent is the exact one, to half a unit in its last place."""
    primals, tangents = primals_and_tangents((2, 2, 33, 16), torch.bfloat16)
    wide = [x.double() for x in (*primals, *tangents)]
    expected = torch.func.jvp(plain, tuple(wide[:3]), tuple(wide[3:]))[1]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out, tangent = torch.func.jvp(attend, primals, tangents)
    assert out.dtype == tangent.dtype == torch.bfloat16
    torch.testing.assert_close(tangent.double(), expected, rtol=2**-8, atol=1e-5)
    q, k, v, t_q, t_k, t_v = (*primals, *tangents)
    exact = attention_tangent(q, k, v, t_q, t_k, t_v)
    assert exact.dtype == torch.float32
    torch.testing.assert_close(exact.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_primal_is_that_of_the_fused_kernel(autocast):
    """To the bit, also where only the differentiable kernel is allowed: the loss forward sees the same network."""
    primals, tangents = primals_and_tangents((2, 2, 33, 16), torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        fused = F.scaled_dot_product_attention(*primals)
        with sdpa_kernel(SDPBackend.MATH):
            assert torch.equal(torch.func.jvp(attend, primals, tangents)[0], fused)
            assert torch.backends.cuda.math_sdp_enabled() and not torch.backends.cuda.flash_sdp_enabled()
        assert torch.equal(attend(*primals), fused)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_checkpointing_and_the_backward_pass(checkpointed):
    """A derivative before it leaves the gradient what it is without."""
    primals, tangents = primals_and_tangents()
    call = (lambda *args: checkpoint(attend, *args, use_reentrant=False)) if checkpointed else attend
    with torch.no_grad():
        got = torch.func.jvp(call, primals, tangents)
    torch.testing.assert_close(got, torch.func.jvp(plain, primals, tangents))
    gradients = []
    for function in (call, plain):
        leaves = [x.clone().requires_grad_() for x in primals]
        gradients.append(torch.autograd.grad(function(*leaves).cos().sum(), leaves))
    torch.testing.assert_close(*gradients)


def test_channels_that_do_not_lie_beside_each_other_are_brought_there_for_the_fused_kernel():
    """As those of U-Nets, for which PyTorch takes plain operations otherwise."""
    primals, tangents = primals_and_tangents()
    strided = [x.mT.contiguous().mT for x in primals]
    leaves = [x.clone().requires_grad_() for x in strided]
    assert all(x.stride(-1) != 1 for x in leaves)
    assert any("FlashAttention" in name for name in graph(attend(*leaves)))
    torch.testing.assert_close(torch.func.jvp(attend, tuple(strided), tangents), torch.func.jvp(plain, primals, tangents))


@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize(
    "dtype, tokens, fused",
    [(torch.bfloat16, 49, False), (torch.bfloat16, 256, True), (torch.float32, 49, True), (torch.float64, 49, True)],
)
def test_gradients_in_bf16_of_few_tokens_are_not_left_to_the_fused_kernel(dtype, tokens, fused, tangent):
    """With a tangent beside it (``tangent.shared_primal``) as without, and close to the exact ones."""
    primals, tangents = primals_and_tangents((2, 2, tokens, 16), torch.float32)
    leaves = [x.clone().requires_grad_() for x in primals]
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    cast = torch.float64 if dtype == torch.float64 else torch.float32
    with autocast, layers.constant_tangents():
        arguments = tuple(x.to(cast) for x in leaves)
        out = torch.func.jvp(attend, arguments, tuple(x.to(cast) for x in tangents))[0] if tangent else attend(*arguments)
    assert any("FlashAttention" in name for name in graph(out)) == fused
    exact_leaves = [x.double().requires_grad_() for x in primals]
    gradients = torch.autograd.grad(out.double().cos().sum(), leaves)
    expected = torch.autograd.grad(plain(*exact_leaves).cos().sum(), exact_leaves)
    for got, exact in zip(gradients, expected, strict=True):
        assert (got - exact).norm() < (0.03 if dtype == torch.bfloat16 else 1e-5) * exact.norm()


class Allocations(TorchDispatchMode):
    """The largest tensor that anything run inside returns, in bytes."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [x.nbytes for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


@pytest.mark.parametrize("heads, head_dim", [(8, 32), (1, 8)])
def test_the_tangent_never_holds_all_scores(heads, head_dim):
    tokens = 1024 if heads > 1 else 2048  # one head: its scores alone exceed the budget
    primals, tangents = primals_and_tangents((1, heads, tokens, head_dim), torch.float32)
    with torch.no_grad(), Allocations() as lean:
        torch.func.jvp(attend, primals, tangents)
    with torch.no_grad(), Allocations() as naive:
        torch.func.jvp(plain, primals, tangents)
    budget = layers.SCORES_BYTES["cpu"]
    assert naive.largest == 4 * heads * tokens**2 >= 4 * budget
    assert budget / 2 < lean.largest <= budget


def test_memory_of_the_tangent_is_linear_in_the_tokens(monkeypatch):
    """Once the scores of all tokens are more than a chunk."""
    monkeypatch.setitem(layers.SCORES_BYTES, "cpu", 2**16)
    few, many = (live_memory(attend, tokens) for tokens in (256, 1024))
    assert 2.5 < many / few < 4.5
    assert 10 < live_memory(plain, 1024) / live_memory(plain, 256)


def live_memory(function, tokens: int) -> int:
    """The most bytes alive in a derivative."""
    primals, tangents = primals_and_tangents((1, 2, tokens, 16), torch.float32)
    with torch.no_grad(), LiveMemory([*primals, *tangents]) as memory:
        torch.func.jvp(function, primals, tangents)
    return memory.peak
