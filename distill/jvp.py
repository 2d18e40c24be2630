"""The derivative of a network along the PF-ODE, by forward-mode AD, made safe for what real networks contain."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from distill.trigflow import expand
from teachers import Teacher
from teachers.networks.layers import constant_tangents


class RNGState(NamedTuple):
    """Where the generators stood that dropout on ``device`` draws from."""

    device: torch.device
    cpu: Tensor
    cuda: Tensor | None


def jvp(
    function: Callable, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], keep_graph: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``function(*primals)`` and its directional derivative along ``tangents``, both detached.

    With ``keep_graph`` the value keeps its graph for a backward pass. What layers do not write out themselves has a graph of
    its derivative then too, which is dropped. With a ``backend`` of torch.compile the differentiation is compiled as a
    whole: of a compiled network PyTorch would differentiate the original.

    ``function`` must call the bare network, not its DDP wrapper, which makes buckets for gradients as it is called: inside
    ``torch.func.jvp`` these would have no memory. Networks that call SDPA themselves get the one kernel that forward mode
    differentiates; ours bring a tangent of less memory (:func:`teachers.networks.layers.attend`). Gradient checkpointing is
    inert where nothing is recorded for a backward pass.
    """
    tangents = tuple(v.to(x.dtype) for x, v in zip(primals, tangents, strict=True))
    on_cpu = primals[0].device.type == "cpu"
    casts = SDPACastFirst() if keep_graph and backend is None and not on_cpu else nullcontext()
    with sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(keep_graph), constant_tangents(), casts:
        value, derivative = (compiled_jvp(backend) if backend else torch.func.jvp)(function, primals, tangents)
    return value, derivative.detach()


class SDPACastFirst(TorchFunctionMode):
    """Casts what PyTorch's attention gets on a GPU under autocast, and calls it without.

    Inside ``torch.func.jvp`` autocast would round each of the operations that the differentiable kernel is made of in its
    own way, and the gradient of its softmax, from bf16 to fp32, is not implemented.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        device = (args[0] if args else kwargs["query"]).device.type
        if not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        dtype = torch.get_autocast_dtype(device)

        def cast(value):
            return value.to(dtype) if isinstance(value, Tensor) and value.dtype == torch.float32 else value

        with torch.autocast(device, enabled=False):
            return function(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})


@cache
def compiled_jvp(backend: str) -> Callable:
    return torch.compile(lambda *arguments: torch.func.jvp(*arguments), backend=backend)


def record_rng(device: torch.device) -> RNGState:
    """The state of the generators that dropout draws from on ``device``."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return RNGState(device, torch.get_rng_state(), cuda)


@contextmanager
def replay_rng(state: RNGState) -> Iterator[None]:
    """Draw again what was drawn after ``record_rng``: the same dropout masks in the derivative and in the loss."""
    torch.set_rng_state(state.cpu)
    if state.cuda is not None:
        torch.cuda.set_rng_state(state.cuda, state.device)
    yield


class ForwardModeError(ValueError):
    """A network that forward-mode AD cannot pass, or whose derivative is wrong; the message names the module."""


def probe_jvp(network: Teacher) -> None:
    """Differentiate ``network`` once, on one random sample, before any training time is spent on it.

    Raises:
        ForwardModeError: naming the first module without a forward-mode derivative.
    """
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(0)
    x_t, dx = (network.sigma_data * torch.randn(1, *network.sample_shape, generator=generator).to(device) for _ in "xv")
    t = torch.ones(1, device=device)
    labels = network.example_condition(1, device)
    traced_jvp(network, lambda x, s: network(x, s, labels), (x_t, t), (dx, torch.ones_like(t)))


def check_jvp(network: Teacher, seed: int = 0, tolerance: float = 1e-3) -> float:
    """Compare the derivative along a random direction with central finite differences in fp64, in one batch of samples at
    times from ``arctan(0.002 / sigma_data)`` to ``arctan(80 / sigma_data)``: six, or three of more than 1024 values.

    Args:
        network: any :class:`teachers.Teacher`, in the state (mode, dtype, autocast) it will be trained in.
        tolerance: largest relative error allowed; loosen it under bf16 autocast.

    Returns:
        The largest relative error of a sample.

    Raises:
        ForwardModeError: naming the first module without a forward-mode derivative, or the error found.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(network.parameters()).device
    ends = torch.tensor([0.002, 80.0], dtype=torch.float64) / network.sigma_data
    num = 6 if math.prod(network.sample_shape) <= 1024 else 3
    t = torch.linspace(*torch.atan(ends).tolist(), num, dtype=torch.float64).float().to(device)
    shape = (len(t), *network.sample_shape)
    x_t, dx = (network.sigma_data * torch.randn(shape, generator=generator).to(device) for _ in range(2))
    labels = network.example_condition(len(t), device)
    scale = t.cos() * t.sin()
    direction = expand(scale, dx) * dx
    rng = record_rng(device)
    tangent = traced_jvp(network, lambda x, s: network(x, s, labels), (x_t, t), (direction, scale))
    reference = copy.deepcopy(network).double()
    wide = [v.double() for v in (x_t, t, direction, scale)]
    expected = finite_difference(lambda x, s: reference(x, s, labels), *wide, rng)
    error = ((tangent - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max().item()
    if not error <= tolerance:
        raise ForwardModeError(
            f"the forward-mode derivative of {type(network.native).__name__} is off by {error:.1e} (relative; "
            f"{tolerance:.0e} is allowed): a module drops or changes tangents, or rounds the time"
        )
    check_time_derivative(network, x_t, t, labels, rng)
    return error


def check_time_derivative(network: Teacher, x_t: Tensor, t: Tensor, labels, rng: RNGState) -> None:
    """Raise :class:`ForwardModeError` if the native network differs between times and has no derivative in time: it rounds
    the time, or looks it up in a table. Finite differences agree with that derivative, so they do not show it.
    """
    calls = []
    hook = network.native.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    try:
        with torch.no_grad():
            network(x_t, t, labels)
    finally:
        hook.remove()
    (x, time, *condition), options = calls[0]

    def at(time: Tensor) -> Tensor:
        with replay_rng(rng):
            return network.native(x, time, *condition, **options)

    value, derivative = jvp(at, (time,), (torch.ones_like(time),))
    with torch.no_grad():
        if not derivative.any() and not torch.equal(at(time.flip(0)), value):
            raise ForwardModeError(
                f"{type(network.native).__name__} has no derivative in time, though it differs between times: it rounds the "
                "time or looks it up in a table, and a consistency model needs one that is smooth in time"
            )


def traced_jvp(module: nn.Module, function: Callable, primals: tuple, tangents: tuple) -> Tensor:
    """The tangent of :func:`jvp`; a failure is reported with the innermost submodule it happened in."""
    running: list[str] = []
    names = {m: name or type(m).__name__ for name, m in module.named_modules()}
    hooks = [m.register_forward_pre_hook(lambda m, _: running.append(names[m])) for m in names]
    hooks += [m.register_forward_hook(lambda *_: running.pop() and None) for m in names]
    try:
        return jvp(function, primals, tangents)[1]
    except (RuntimeError, NotImplementedError) as error:
        where = running[-1] if running else type(module).__name__
        kind = type(dict(module.named_modules()).get(where, module)).__name__
        reason = str(error).strip().splitlines()[0]
        raise ForwardModeError(f"forward-mode AD cannot pass module {where!r} ({kind}): {reason}") from error
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def finite_difference(
    function: Callable, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor, rng: RNGState, h: float = 1e-5
) -> Tensor:
    """Central difference along ``(dx, dt)``, both sides with the same dropout masks."""
    sides = []
    for sign in (1, -1):
        with replay_rng(rng):
            sides.append(function(x + sign * h * dx, t + sign * h * dt))
    return (sides[0] - sides[1]) / (2 * h)
