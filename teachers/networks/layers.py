"""Layers shared by the networks. Each one supports forward-mode AD, reverse-mode AD, autocast and fp64."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from teachers.networks.flash_attention import fits_flash_attention, flash_attend

# Whether tangents record a graph of their own, in a dictionary because torch.compile stops at a context variable.
TANGENTS = {"differentiable": True}

# In which dtype :func:`conv2d` computes tangents, and the gradients of what has one, if not in that of its weights; a
# dictionary for the same reason. Set by :func:`unrounded_value`.
DERIVATIVES: dict[str, torch.dtype | None] = {"dtype": None}


@contextmanager
def constant_tangents() -> Iterator[None]:
    """Inside, the tangents that layers write out have no graph: where only the primal is differentiated again, theirs is
    time and memory for nothing.
    """
    before, TANGENTS["differentiable"] = TANGENTS["differentiable"], False
    try:
        yield
    finally:
        TANGENTS["differentiable"] = before


def tangents_have_graphs() -> bool:
    return torch.is_grad_enabled() and TANGENTS["differentiable"]


def tangent_mode() -> torch.set_grad_enabled:
    """Context in which a layer computes its tangent. The dual tensor is made outside, or the primal would lose its graph."""
    return torch.set_grad_enabled(tangents_have_graphs())


class GroupNorm(nn.GroupNorm):
    """Group normalisation in fp32 or better whose forward-mode derivative is written out.

    ``torch.nn.functional.group_norm`` differentiates only contiguous inputs in forward mode, through a slow
    decomposition, and under CPU autocast returns a tangent of another dtype than its primal. Here the primal is
    always the fused kernel, in any memory format, and the tangent is its closed form.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            wide = x if x.dtype == torch.float64 else x.float()
            primal, tangent = fwAD.unpack_dual(wide)
            if tangent is None:
                weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
                group_norm = CompiledGroupNorm.apply if torch.compiler.is_compiling() else F.group_norm
                out = group_norm(wide, self.num_groups, weight, bias, self.eps)
            else:
                out = self.dual_forward(primal, tangent)
            return out.to(x.dtype)

    def dual_forward(self, x: Tensor, t_x: Tensor) -> Tensor:
        """``y = w x^ + b`` and ``t_y = w rstd (t_x - mean(t_x) - x^ mean(x^ t_x))`` with ``x^ = (x - mean) rstd``, as one
        affine map of ``t_x`` and ``x``: few passes over memory.
        """
        b, c, *space = x.shape
        # Tokens transposed to channels, as attention blocks of others pass them. A single sample counts as channels_last
        # whatever its strides are, but not for native_group_norm, which takes that format on a CPU only.
        channels_last = b > 1 and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
        keeps = channels_last and (x.device.type == "cpu" or torch.compiler.is_compiling())
        x = x if keeps else x.contiguous()
        scale, shift = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if torch.compiler.is_compiling():
            y, mean, rstd = compiled_group_norm(x, self.num_groups, scale, shift, self.eps)
        else:
            y, mean, rstd = torch.native_group_norm(x, scale, shift, b, c, math.prod(space), self.num_groups, self.eps)
        with tangent_mode():
            t_y = self.tangent(x, t_x, scale, mean, rstd)
        return fwAD.make_dual(y, t_y)

    def tangent(self, x: Tensor, t_x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        """``t_y`` ``(B, C, ...)``; ``mean`` and ``rstd`` are ``(B, num_groups)``."""
        size = x[0].numel() // self.num_groups
        t_mean, product = (sums_by_channel(z, self.num_groups).sum(2) / size for z in (t_x, t_x * x))
        slope = (product - mean * t_mean) * rstd.square()  # mean(x^ t_x) rstd

        weight = scale.view(1, self.num_groups, -1) * rstd[:, :, None]
        offset, factor = (of_channels(weight * z[:, :, None], x) for z in (mean * slope - t_mean, -slope))
        return torch.addcmul(offset, t_x, of_channels(weight, x)).addcmul_(x, factor)


def fast_layout(x: Tensor) -> Tensor:
    """``x`` ``(B, C, H, W)`` in the memory format in which a CPU's convolutions are fastest. What follows keeps it."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


def channels_last_parts(network: nn.Module) -> list[nn.Module]:
    """The parts of ``network`` that arrange what they compute by :func:`fast_layout`: their class says so."""
    return [module for module in network.modules() if getattr(type(module), "channels_last", False)]


def fast_weights(network: nn.Module) -> nn.Module:
    """Bring weights that meet :func:`fast_layout` into the same memory format, in place: a convolution would otherwise
    rearrange them each time, which costs some percent of a step where the batch is small.
    """
    for part in channels_last_parts(network):
        if next(part.parameters()).device.type == "cpu":
            part.to(memory_format=torch.channels_last)
    return network


def compiled_group_norm(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What ``torch.native_group_norm`` returns, without the turn to channels_first that a compiler gives PyTorch's own: the
    normalised ``(B, C, ...)``, and mean and 1 / standard deviation of each group ``(B, num_groups)``.
    """
    size = x[0].numel() // num_groups
    mean = sums_by_channel(x, num_groups).sum(2) / size
    centered = x - of_channels(mean[:, :, None].expand(-1, -1, x.shape[1] // num_groups), x)
    rstd = (sums_by_channel(centered.square(), num_groups).sum(2) / size + eps).rsqrt()
    scale = weight.view(1, num_groups, -1) * rstd[:, :, None]
    shift = bias.view(1, num_groups, -1) - mean[:, :, None] * scale
    return torch.addcmul(of_channels(shift, x), x, of_channels(scale, x)), mean, rstd


class CompiledGroupNorm(torch.autograd.Function):
    """``torch.nn.functional.group_norm`` whose gradient a compiler vectorises, as it does not PyTorch's own."""

    @staticmethod
    def forward(ctx, x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, rstd = compiled_group_norm(x, num_groups, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        """``dx = rstd (w grad - mean(w grad) - x^ mean(w grad x^))``, ``x^ = (x - mean) rstd``, means over a group."""
        x, weight, mean, rstd = ctx.saved_tensors
        size = x.numel() // mean.numel()
        mean, rstd, weight = mean[:, :, None], rstd[:, :, None], weight.view(1, mean.shape[1], -1)
        total, product = (sums_by_channel(z, mean.shape[1]) for z in (grad, grad * x))
        product = (product - mean * total) * rstd  # grad x^
        slope = rstd * (weight * product).sum(2, keepdim=True) / size
        offset = mean * slope - (weight * total).sum(2, keepdim=True) / size
        by_grad, by_x, constant = (of_channels(rstd * z.expand(total.shape), x) for z in (weight, -slope, offset))
        return grad * by_grad + x * by_x + constant, None, product.sum(0).flatten(), total.sum(0).flatten(), None


def sums_by_channel(x: Tensor, num_groups: int) -> Tensor:
    """Of ``x`` ``(B, C, ...)`` over space, ``(B, num_groups, C / num_groups)``.

    On the way to the sums of groups they pay: in channels_last a group's values are not one stretch of memory.
    """
    return x.reshape(*x.shape[:2], -1).sum(2).view(len(x), num_groups, -1)


def of_channels(coefficients: Tensor, x: Tensor) -> Tensor:
    """``(B, num_groups, C / num_groups)`` as ``(B, C, 1, ...)``, to multiply ``x`` with.

    For a compiler it is a tensor of its own. Within the loop over ``x`` it would compute what that is made of once per
    element, and find the group by a division, with which loops are not vectorised.
    """
    flat = coefficients.contiguous().as_strided(x.shape[:2], (x.shape[1], 1))
    return flat.view(*x.shape[:2], *[1] * (x.ndim - 2))


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """Convolution whose forward-mode derivative is one more convolution, with the weights constant.

    PyTorch's own rule adds a third one, of ``x`` with a tangent of zeros for the weights.
    """
    primal, tangent = fwAD.unpack_dual(x)
    if tangent is None:
        return F.conv2d(primal, weight, bias, padding=padding)
    dtype = DERIVATIVES["dtype"]
    if dtype is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        out = F.conv2d(primal, weight, bias, padding=padding)
    else:
        out = RoundedGradientConv2d.apply(primal, weight, bias, padding, dtype)
    with tangent_mode():
        if dtype is not None:
            tangent, weight = tangent.to(dtype), weight.to(dtype)
        t_out = F.conv2d(tangent, weight, padding=padding).to(out.dtype)
    return fwAD.make_dual(out, t_out)


class RoundedGradientConv2d(torch.autograd.Function):
    """A convolution in the dtype of its weights whose gradient is that of inputs and weights rounded to another."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, dtype: torch.dtype) -> Tensor:
        return F.conv2d(x, weight, bias, padding=padding)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, bias, ctx.padding, dtype = inputs
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        ctx.save_for_backward(x.to(dtype), weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        one, padding, needed = [1, 1], [ctx.padding] * 2, ctx.needs_input_grad[:3]
        found = torch.ops.aten.convolution_backward(
            grad.to(x.dtype), x, weight.to(x.dtype), ctx.bias_sizes, one, padding, one, False, [0, 0], 1, needed
        )
        return (*(None if g is None else g.to(weight.dtype) for g in found), None, None)


def upsample_nearest(x: Tensor) -> Tensor:
    """``x`` ``(B, C, H, W)`` at twice its resolution, every pixel four times."""
    primal, tangent = fwAD.unpack_dual(x)
    if tangent is None:
        return repeat_pixels(primal)
    with tangent_mode():
        t_out = repeat_pixels(tangent)
    return fwAD.make_dual(repeat_pixels(primal), t_out)


def repeat_pixels(x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return expand_pixels(x)
    # On a CPU PyTorch's kernel turns channels_first into channels_last first, which takes several times as long as it does.
    if x.device.type == "cpu" and x.is_contiguous():
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return F.interpolate(x, scale_factor=2, mode="nearest")


def expand_pixels(x: Tensor) -> Tensor:
    """:func:`repeat_pixels` whose gradient a compiler makes a sum: that of PyTorch's own becomes a scatter, one by one."""
    b, c, h, w = x.shape
    if x.is_contiguous(memory_format=torch.channels_last):
        pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(b, h, 2, w, 2, c)
        return pixels.reshape(b, 2 * h, 2 * w, c).permute(0, 3, 1, 2)
    return x[:, :, :, None, :, None].expand(b, c, h, 2, w, 2).reshape(b, c, 2 * h, 2 * w)


class DualLinear(nn.Linear):
    """Linear layer whose forward-mode derivative is written out, with the weights constant."""

    def forward(self, x: Tensor) -> Tensor:
        primal, tangent = fwAD.unpack_dual(x)
        out = self.linear(primal, self.bias)
        if tangent is None:
            return out
        with tangent_mode():
            t_out = self.linear(tangent)
        return fwAD.make_dual(out, t_out)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight, bias)


def scaled_sum(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """``(x + y) * scale``, whose forward-mode derivative is written out: PyTorch's own adds and multiplies zeros."""
    (x, t_x), (y, t_y) = fwAD.unpack_dual(x), fwAD.unpack_dual(y)
    out = (x + y) * scale
    if t_x is None and t_y is None:
        return out
    with tangent_mode():
        t_sum = t_y if t_x is None else t_x if t_y is None else t_x + t_y
        t_out = (t_sum * scale).to(out.dtype)
    return fwAD.make_dual(out, t_out)


def silu(x: Tensor) -> Tensor:
    """SiLU whose forward-mode derivative has no graph inside :func:`constant_tangents`."""
    primal, tangent = fwAD.unpack_dual(x)
    if tangent is None or tangents_have_graphs():
        return F.silu(x)
    with torch.no_grad():
        t_out = torch.ops.aten.silu_backward(tangent, primal)
    return fwAD.make_dual(F.silu(primal), t_out)


class SiLU(nn.SiLU):
    def forward(self, x: Tensor) -> Tensor:
        return silu(x)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """``torch.nn.functional.dropout`` with the same masks in any memory format, with a tangent and without, where PyTorch's
    own are the same for contiguous tensors only.
    """
    return x * F.dropout(x.new_ones(x.shape), p) if training and p > 0 else x


def has_tangent(x: Tensor) -> bool:
    """Whether ``x`` is differentiated in forward mode."""
    return fwAD.unpack_dual(x).tangent is not None


def unrounded(layer: nn.Module, x: Tensor, **options) -> Tensor:
    """``layer(x, **options)`` in the dtype of its weights, whatever autocast says."""
    if layer.weight is None:
        return layer(x, **options)
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.to(layer.weight.dtype), **options)


def unrounded_value(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``; where ``x`` has a tangent, :func:`unrounded`, but for the tangent itself and the gradient of a layer
    that calls :func:`conv2d`: these are in autocast's dtype.

    Later layers are differentiated at the value, so its rounding changes their derivatives. The tangent goes through them
    linearly.
    """
    if not has_tangent(x):
        return layer(x)
    kind, before = x.device.type, DERIVATIVES["dtype"]
    DERIVATIVES["dtype"] = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    try:
        return unrounded(layer, x)
    finally:
        DERIVATIVES["dtype"] = before


class Exact:
    """Makes a layer compute in the dtype of its weights, whatever autocast says."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class ExactLinear(Exact, nn.Linear): ...


class ExactConv2d(Exact, nn.Conv2d): ...


class TimeLinear(DualLinear):
    """A linear layer of the time path: it computes in fp32, or in fp64 with fp64 weights, whatever its input has."""

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return F.linear(x.to(dtype), self.weight.to(dtype), None if bias is None else bias.to(dtype))


class TimeEmbedding(nn.Module):
    """Base of the sinusoidal embeddings: angles are computed in fp64 whatever autocast says.

    Rounding the time to bf16 alone makes the time derivative about 100 % wrong. NCSN++ multiplies the time by up to 300:
    rounding the product, or the time itself, to fp32 takes the derivative's error past 1e-5.
    """

    def frequencies(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError

    def angles(self, t: Tensor) -> Tensor:
        t = t.double()
        return t[:, None] * self.frequencies(t.device, t.dtype)[None, :]

    def cos_sin(self, t: Tensor) -> Tensor:
        """``[cos(w t), sin(w t)]`` ``(B, dim)`` in fp32, or in fp64 for fp64 times."""
        angles = self.angles(t)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
        return waves if t.dtype == torch.float64 else waves.float()


class PositionalEmbedding(TimeEmbedding):
    """``[cos(w t), sin(w t)]`` with geometrically spaced frequencies from 1 down to ``1 / max_period``.

    Input ``(B,)``, output ``(B, dim)`` in fp32 (fp64 for fp64 input). ``endpoint`` includes ``1 / max_period`` itself
    (Song et al. 2021 and EDM's DDPM++); without it the spacing is that of DDPM, ADM and DiT.
    """

    def __init__(self, dim: int, max_period: float = 10_000.0, endpoint: bool = False):
        super().__init__()
        if dim % 2:
            raise ValueError(f"an embedding's dimension must be even, got {dim}")
        self.dim, self.max_period, self.endpoint = dim, max_period, endpoint

    def frequencies(self, device, dtype):
        half = self.dim // 2
        ramp = torch.arange(half, device=device, dtype=dtype) / (half - 1 if self.endpoint else half)
        return torch.exp(-math.log(self.max_period) * ramp)

    def forward(self, t: Tensor) -> Tensor:
        return self.cos_sin(t)


class FourierEmbedding(TimeEmbedding):
    """``[cos(w t), sin(w t)]`` with random frequencies, fixed at initialisation and saved (NCSN++, arXiv 2011.13456).

    Input ``(B,)``, output ``(B, dim)`` in fp32 (fp64 for fp64 input).
    """

    def __init__(self, dim: int, scale: float = 16.0):
        super().__init__()
        if dim % 2:
            raise ValueError(f"an embedding's dimension must be even, got {dim}")
        self.register_buffer("freqs", torch.randn(dim // 2) * scale)

    def frequencies(self, device, dtype):
        return 2 * math.pi * self.freqs.to(device, dtype)

    def forward(self, t: Tensor) -> Tensor:
        return self.cos_sin(t)


# Bytes of one chunk of attention scores in the tangent of :func:`attend`; about four such tensors live at a time. On a CPU
# what its caches hold is fastest: twice as fast as all scores at once from 1024 tokens on. Elsewhere a chunk must be large
# enough to keep the device busy: on an H200 a sixteenth of this takes 2 to 6 times as long, four times as much saves 4 %.
SCORES_BYTES = {"cpu": 2**22}
SCORES_BYTES_ELSEWHERE = 2**28

# Up to so many tokens a CPU's attention with its backward pass in bf16 is faster, two to six times, by plain operations than
# by the fused kernel (benchmarks/attention_backward.py).
MATH_TOKENS = 100

FUSED_OR_MATH = [
    SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH,
]  # fmt: skip


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over ``(B, heads, tokens, head_dim)``, scaled by ``head_dim ** -0.5``.

    It is torch's fused kernel, except where :func:`fused_backward_is_slow`, and on a GPU where value and derivative are
    computed in one pass for a gradient. That kernel has no forward-mode derivative; the tangent is
    :func:`attention_tangent`, or where :mod:`teachers.networks.flash_attention` is asked for, that kernel's.
    """
    # Fused kernels take channels that lie beside each other; for others PyTorch falls back to plain operations.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    dual = q, k, v
    (q, t_q), (k, t_k), (v, t_v) = (fwAD.unpack_dual(x) for x in dual)
    if t_q is None and t_k is None and t_v is None:
        with sdpa_kernel(SDPBackend.MATH) if fused_backward_is_slow(q, k) else nullcontext():
            return F.scaled_dot_product_attention(q, k, v)
    if fits_flash_attention(q, k, v):
        return flash_attend(*dual)
    # Around networks that call torch's function themselves, distill.jvp allows only the kernel with a derivative. Inside
    # torch.func.jvp a GPU's fused kernels do not see that a gradient will be asked for, and do not keep what it needs.
    plain = fused_backward_is_slow(q, k) or (q.device.type != "cpu" and torch.is_grad_enabled())
    with sdpa_kernel(SDPBackend.MATH if plain else FUSED_OR_MATH):
        out = F.scaled_dot_product_attention(q, k, v)
    with tangent_mode(), torch.autocast(q.device.type, enabled=False):
        tangents = [torch.zeros_like(x) if t_x is None else t_x for x, t_x in ((q, t_q), (k, t_k), (v, t_v))]
        with tf32_products() if rounds_more_than_tf32(out) else nullcontext():
            t_out = attention_tangent(q, k, v, *tangents).to(out.dtype)
    return fwAD.make_dual(out, t_out)


def rounds_more_than_tf32(x: Tensor) -> bool:
    """Whether ``x`` is on a GPU in half precision, which rounds as much as TF32 or more; not told to a compiler."""
    return x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16) and not torch.compiler.is_compiling()


@contextmanager
def tf32_products() -> Iterator[None]:
    """Inside, a GPU's matrix products of fp32 are those of TF32, several times as fast."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def fused_backward_is_slow(q: Tensor, k: Tensor) -> bool:
    """Whether this may be asked for a gradient that the CPU's fused kernel is slow to give: in bf16, of few tokens."""
    if q.device.type != "cpu" or not torch.is_grad_enabled():
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype
    return dtype == torch.bfloat16 and k.shape[-2] <= MATH_TOKENS


def attention_tangent(q: Tensor, k: Tensor, v: Tensor, t_q: Tensor, t_k: Tensor, t_v: Tensor) -> Tensor:
    """The tangent ``(B, heads, tokens, head_dim)`` of attention, in fp32 or better, by chunks of heads or of queries.

    Beside its inputs in that precision it needs a few times ``SCORES_BYTES``, whatever the number of tokens and heads.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    flat = [x.to(dtype).flatten(0, 1) for x in (q, t_q, k, t_k, v, t_v)]
    queries, keys = q.shape[2], k.shape[2]
    scores = SCORES_BYTES.get(q.device.type, SCORES_BYTES_ELSEWHERE) // dtype.itemsize
    rows = min(queries, max(1, scores // keys))
    heads = max(1, scores // (rows * keys))
    chunks = []
    for q, t_q, *keys_and_values in zip(*(x.split(heads) for x in flat), strict=True):
        pairs = zip(q.split(rows, dim=1), t_q.split(rows, dim=1), strict=True)
        chunks.append(torch.cat([chunk_tangent(*pair, *keys_and_values) for pair in pairs], dim=1))
    return torch.cat(chunks).view(v.shape[0], v.shape[1], queries, v.shape[3])


def chunk_tangent(q: Tensor, t_q: Tensor, k: Tensor, t_k: Tensor, v: Tensor, t_v: Tensor) -> Tensor:
    """With ``P = softmax(S)``, ``S = q k^T / sqrt(d)``: ``t_P v + P t_v``, where ``t_P = P (t_S - rowsum(P t_S))``."""
    scale = q.shape[-1] ** -0.5
    P = torch.softmax(q * scale @ k.mT, dim=-1)
    t_S = torch.cat([t_q, q], dim=-1) * scale @ torch.cat([k, t_k], dim=-1).mT
    t_P = P * (t_S - (P * t_S).sum(dim=-1, keepdim=True))
    return t_P @ v + P @ t_v


def pixel_norm(x: Tensor, dim: int = -1, eps: float = 1e-6) -> Tensor:
    """``x / rms(x)`` over one dimension (Karras et al. 2018), the second norm of adaptive double normalisation."""
    return x * torch.rsqrt(x.square().mean(dim, keepdim=True) + eps)
