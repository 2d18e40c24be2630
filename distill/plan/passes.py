"""What one pass of a network costs: FLOPs and memory, counted on torch's fake tensors.

These have shapes, dtypes and storages, but no memory: the operations are those of the real pass, of any size, in a second or
two. FLOPs are those of ``torch.utils.flop_counter``: two for each multiplication with addition, in convolutions, matrix
products and attention. Memory is that of the storages which are alive at the same time; what kernels use inside is not seen.
"""

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from distill.device import autocast
from distill.jvp import jvp
from distill.parallel import blocks
from distill.plan.networks import Networks, hollow
from distill.recipe import Recipe
from teachers import Teacher
from teachers.networks import layers


class LiveMemory(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still alive, and the most there have been.

    Args:
        known: tensors whose storages are not counted.
    """

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata: tensor for tensor in known}
        self.sizes: dict[int, int] = {}
        self.live = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage) -> None:
        key = storage._cdata
        if key in self.known or key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.live += self.sizes[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.free, key)

    def free(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


@dataclass
class Pass:
    """What one pass of a network costs: FLOPs for an image, and bytes beside the weights, linear in the batch."""

    flops: float
    per_image: float
    fixed: float = 0.0

    def bytes(self, batch: float) -> float:
        return self.fixed + self.per_image * batch

    def largest_batch(self, budget: float) -> int:
        return max(0, math.floor((budget - self.fixed) / self.per_image))


def make_tables(network: Teacher) -> None:
    """Have the tables of the network's noise schedules computed, which are kept: they must not be fake ones."""
    for each in filter(None, (network, network.guidance_teacher)):
        each.parameterization.coefficients(torch.ones(1, dtype=torch.float64), each.sigma_data)


@contextmanager
def attention_as_on_gpu(wanted: bool) -> Iterator[None]:
    """Let the tangent of attention take the chunks that it takes on a GPU."""
    before = layers.SCORES_BYTES["cpu"]
    layers.SCORES_BYTES["cpu"] = layers.SCORES_BYTES_ELSEWHERE if wanted else before
    try:
        yield
    finally:
        layers.SCORES_BYTES["cpu"] = before


class Passes:
    """The passes of a training step, each run on fake tensors when it is first asked for.

    Args:
        networks: what :func:`planned_networks` returns.
        gpu: whether memory is that of a GPU.
        processes: that share the recipe's batch out.

    Raises (every pass):
        ValueError: a network whose forward depends on the values of tensors.
    """

    def __init__(self, recipe: Recipe, networks: Networks, gpu: bool, processes: int = 1):
        self.recipe, self.networks, self.gpu = recipe, networks, gpu
        self.batch = max(1, recipe.train_batch_size // processes)
        self.shared_primal = recipe.tangent.shared_primal
        for network in filter(None, (networks.student, networks.teacher)):
            make_tables(network)
        with FakeTensorMode(allow_non_fake_inputs=True) as self.mode:
            self.student = hollow(networks.student, "cpu").train(recipe.dropout > 0)
            self.teacher = None if networks.teacher is None else hollow(networks.teacher, "cpu").eval()

    def run(self, network: Teacher, batch: int, call: Callable) -> tuple[float, int]:
        """FLOPs of ``call(x, t, labels, guidance)`` and the most bytes alive in it beside the weights."""
        counter = FlopCounterMode(display=False)
        with counter:
            peak = self.peak(network, batch, call)
        return counter.get_total_flops(), peak

    def peak(self, network: Teacher, batch: int, call: Callable) -> int:
        precision = autocast(self.recipe.mixed_precision, torch.device("cpu"))
        try:
            with self.mode, attention_as_on_gpu(self.gpu):
                x, t = torch.zeros(batch, *network.sample_shape), torch.ones(batch)
                labels, guidance = network.example_condition(batch), t if network.accepts_guidance else None
                memory = LiveMemory([*network.parameters(), *network.buffers()])
                with precision, memory:
                    call(x, t, labels, guidance)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{type(network.native).__name__} cannot be run without weights: {reason}") from error
        return memory.peak

    @cached_property
    def student_evaluation(self) -> Pass:
        """The student's result alone."""
        return self.without_gradients(self.student, torch.no_grad()(self.student))

    @cached_property
    def teacher_evaluation(self) -> Pass:
        """The teacher's result, with its guidance."""
        return self.without_gradients(self.teacher, torch.no_grad()(self.teacher))

    @cached_property
    def derivative(self) -> Pass:
        """The student's value and derivative along the PF-ODE."""

        def call(x, t, labels, guidance):
            jvp(lambda x, t: self.student(x, t, labels, guidance), (x, t), (x.clone(), t.clone()))

        return self.without_gradients(self.student, call)

    def without_gradients(self, network: Teacher, call: Callable) -> Pass:
        batch = min(self.batch, 16)  # of a large one the tangent of attention has many chunks
        flops, peak = self.run(network, batch, call)
        return Pass(flops / batch, peak / batch)

    @cached_property
    def training(self) -> Pass:
        """The student's forward and backward pass. Gradients of weights are left out, which are counted with the weights."""
        call = forward_and_backward(self.student, self.shared_primal)
        flops, _ = self.run(self.student, self.batch, call)  # the counter keeps some tensors
        return self.with_gradients(self.student, flops / self.batch, call)

    @cached_property
    def checkpointed_training(self) -> Pass:
        """:attr:`training` with each block of the network checkpointed: what lies between blocks is kept, the rest computed
        again.
        """
        with self.mode:
            student = hollow(self.student, "cpu")
        for block in blocks(student.native):
            block.forward = Recomputed(block.forward)
        flops = self.training.flops + self.student_evaluation.flops
        return self.with_gradients(student, flops, forward_and_backward(student))

    def with_gradients(self, student: Teacher, flops: float, call: Callable) -> Pass:
        once, twice = (self.peak(student, batch, call) for batch in (self.batch, 2 * self.batch))
        return Pass(flops, (twice - once) / self.batch, 2 * once - twice)


def forward_and_backward(student: Teacher, with_derivative: bool = False) -> Callable:
    """A pass that drops the gradient of each weight as soon as it is whole; its forward may give the derivative too."""

    def call(x, t, labels, guidance):
        trained = [p for p in student.parameters() if p.requires_grad]
        hooks = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in trained]
        value = lambda x, t: student(x, t, labels, guidance)  # noqa: E731
        F = jvp(value, (x, t), (x.clone(), t.clone()), keep_graph=True)[0] if with_derivative else value(x, t)
        F.float().square().sum().backward()
        for hook in hooks:
            hook.remove()

    return call


class Recomputed:
    """A forward whose inside is computed again in the backward pass."""

    def __init__(self, forward: Callable):
        self.forward = forward

    def __call__(self, *args, **kwargs):
        return checkpoint(self.forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
