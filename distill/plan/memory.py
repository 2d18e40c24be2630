"""The memory of a training step on each device, by how the step is run, and what would fit."""

import math
import os
from dataclasses import dataclass

import torch

from distill.parallel import (
    blocks,
    checkpoints_activations,
    is_sharded,
    local_world_size,
    offloads,
    technique,
    world_size,
)
from distill.plan.networks import Networks, planned_networks
from distill.plan.passes import Pass, Passes, forward_and_backward
from distill.recipe import Recipe
from distill.trainer import uses_derivative
from teachers import Teacher

GB = 1e9
USABLE = 0.92  # of a GPU's memory; the rest is the CUDA context, workspaces of kernels, and gaps of the allocator


def state_bytes(recipe: Recipe, networks: Networks) -> dict[str, int]:
    """Bytes of everything that lives through a step on one process, in fp32, by what it is."""
    trained, averages = networks.trained(), len(recipe.ema) + (recipe.target_half_life_images is not None)
    fake = 0 if recipe.vsd is None else sum(p.numel() for p in networks.student.parameters())
    return {
        "weights": 4 * (trained + fake),
        "gradients": 4 * (trained + fake),
        "optimizer": 8 * (trained + fake),
        "averages": 4 * trained * averages,
        "frozen networks": 4 * networks.frozen(),
    }


@dataclass
class Memory:
    """Bytes of one process in a step: its state, and what the largest pass needs on top."""

    state: dict[str, int]
    passes: list[Pass]

    def total(self, batch: int) -> float:
        return sum(self.state.values()) + self.activations(batch)

    def activations(self, batch: int) -> float:
        return max(p.bytes(batch) for p in self.passes)

    def largest_batch(self, memory: float) -> int:
        """The largest batch of one process in so many bytes."""
        return min(p.largest_batch(memory - sum(self.state.values())) for p in self.passes)


def step_memory(passes: Passes, checkpointed: bool = False) -> Memory:
    """The memory of a step on one process, without what several processes need to work together. Without checkpointing the
    derivative, which keeps nothing for later, never needs more than the backward pass.
    """
    state = state_bytes(passes.recipe, passes.networks)
    if not checkpointed:
        return Memory(state, [passes.training])
    return Memory(state, [passes.checkpointed_training, *([passes.derivative] if uses_derivative(passes.recipe) else [])])


@dataclass
class Option:
    """One way to run a step on several devices: what each of them holds."""

    devices: int
    sharded: bool  # FSDP2, else DDP
    checkpointed: bool
    memory: Memory

    @property
    def name(self) -> str:
        kind = f"FSDP2 over {self.devices}" if self.sharded else "DDP" if self.devices > 1 else "one device"
        return kind + ", activation checkpointing" * self.checkpointed

    def advice(self, recipe: Recipe, available: float) -> str | None:
        """The values of the recipe that let it fit, with the same images a step; ``None`` if nothing does."""
        images, largest = recipe.train_batch_size * recipe.gradient_accumulation_steps, self.memory.largest_batch(available)
        most = min(largest, recipe.train_batch_size // self.devices)
        batch = self.devices * max((n for n in range(1, most + 1) if images % (n * self.devices) == 0), default=0)
        values = f"train_batch_size={batch} gradient_accumulation_steps={images // batch}" if batch else None
        if values is None or (self.devices == 1 and not self.checkpointed):
            return values
        return f"{self.name}: {values}"


def option(
    networks: Networks, memory: Memory, devices: int, shares: int, checkpointed: bool, offloaded: bool = False
) -> Option:
    """DDP keeps a second copy of the gradients, to send. FSDP2 divides everything into ``shares``, of which HSDP has as many
    as a node has devices, gathers the weights of one block while it computes another, and holds the whole gradient of one.
    Where shares are ``offloaded`` they lie elsewhere.
    """
    state, sharded = dict(memory.state), shares > 1
    if sharded:
        sizes = [sum(p.numel() for p in block.parameters()) for block in blocks(networks.student.native)]
        state = {} if offloaded else {name: math.ceil(size / shares) for name, size in state.items()}
        state["gathered blocks"] = 12 * max(sizes, default=networks.trained())
    elif devices > 1:
        state["gradients"] *= 2
    return Option(devices, sharded, checkpointed, Memory(state, memory.passes))


def options(passes: Passes, devices: int) -> list[Option]:
    """Every way to run a step on so many devices."""
    memories = [step_memory(passes, checkpointed) for checkpointed in (False, True)]
    return [
        option(passes.networks, memory, devices, shares, bool(checkpointed))
        for shares in ((1, devices) if devices > 1 else (1,))
        for checkpointed, memory in enumerate(memories)
    ]


def what_would_fit(passes: Passes, available: float, devices: int) -> str:
    """The options on so many devices that fit into so many bytes each, as clauses; else the fewest devices on which one
    image does.
    """
    recipe = passes.recipe
    fitting = [advice for way in options(passes, devices) if (advice := way.advice(recipe, available)) is not None]
    if fitting:
        return "; ".join(fitting)
    for more in (2**n for n in range(1, 12)):
        way = option(passes.networks, step_memory(passes, checkpointed=True), more, shares=more, checkpointed=True)
        if way.memory.largest_batch(available) > 0:
            return f"{way.name}: train_batch_size={more}"
    return "nothing: one image is too large"


def device_memory() -> tuple[bool, float]:
    """Whether this process has a GPU, and the bytes that it can use of it, or of the machine that it shares with others."""
    if torch.cuda.is_available():
        return True, USABLE * torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return False, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / local_world_size()


def fit_to_device(recipe: Recipe, pretrained: Teacher | None = None) -> Memory | None:
    """The memory of this process in a step, at the recipe's batch; ``None`` if a network is not here, or cannot be run
    without weights.

    Raises:
        ValueError: it is more than this device has; with what would fit.
    """
    gpu, available = device_memory()
    try:
        networks = planned_networks(recipe, pretrained)
        if networks.assumed:
            return None
        passes = Passes(recipe, networks, gpu, world_size())
        checkpointed = checkpoints_activations(recipe)
        if checkpointed:
            here = step_memory(passes, checkpointed)
        else:
            call = forward_and_backward(passes.student, passes.shared_primal)
            activations = passes.peak(passes.student, passes.batch, call)
            here = Memory(state_bytes(recipe, networks), [Pass(0.0, activations / passes.batch)])
    except Exception:  # whatever is wrong, also in a user's network, is said better where it is loaded
        return None
    devices, shares = world_size(), 1
    if is_sharded(recipe):
        shares = local_world_size() if technique(recipe) == "hsdp" else devices
    here = option(networks, here, devices, shares, checkpointed, gpu and offloads(recipe)).memory
    needed, state = here.total(passes.batch), sum(here.state.values())
    if needed <= available:
        return here
    raise ValueError(
        f"a step of {passes.batch} images needs about {needed / GB:,.1f} GB ({state / GB:,.1f} of them for "
        f"{', '.join(here.state)}), and {available / GB:,.1f} GB can be used; what would fit: "
        f"{what_would_fit(passes, available, devices)}"
    )
