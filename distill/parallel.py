"""Networks on several devices, applied from outside the network: whole on each one (DDP, by Accelerate), or in shards, over
all of them (FSDP2, torch's ``fully_shard``), or over those of one node with a copy on every node (HSDP).

Accelerate's own FSDP2 is not used: it casts the time to bf16, shards one network alone, and does nothing on CPUs.
"""

import copy
import functools
import os
import warnings
from collections import Counter
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import is_bf16_available
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill.recipe import Recipe
from teachers import Teacher
from teachers.networks import DiffusersDiT, DiffusersText, DiffusersUNet2D
from teachers.networks.flash_attention import flash_attention_is_installed
from teachers.networks.layers import channels_last_parts, fast_weights
from teachers.pretrained import load_tensors

OF_DIFFUSERS = (DiffusersDiT, DiffusersText, DiffusersUNet2D)

# ---- what was asked for ----------------------------------------------------------------------------------------------


def world_size() -> int:
    """The number of processes that this one was launched with."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")


def technique(recipe: Recipe) -> str:
    """``ddp``, ``fsdp`` or ``hsdp``: the recipe's, or what ``accelerate config`` says."""
    return recipe.distributed or ("fsdp" if is_set("ACCELERATE_USE_FSDP") else "ddp")


def is_sharded(recipe: Recipe) -> bool:
    return world_size() > 1 and technique(recipe) != "ddp"


def offloads(recipe: Recipe) -> bool:
    return recipe.cpu_offload or (technique(recipe) != "ddp" and is_set("FSDP_OFFLOAD_PARAMS"))


def checkpoints_activations(recipe: Recipe) -> bool:
    configured = is_set("ACCELERATE_USE_FSDP") and is_set("FSDP_ACTIVATION_CHECKPOINTING")
    return recipe.activation_checkpointing or configured


def check_launcher() -> None:
    """Raise ``ValueError`` for what ``accelerate config`` offers and this project does not."""
    if is_set("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "DeepSpeed cannot train consistency models: its ZeRO-3 layers have no forward-mode derivative; run accelerate "
            "config again without it, and set distributed: fsdp in the recipe"
        )
    for variable, name in (("MEGATRON_LM", "Megatron-LM"), ("PARALLELISM_CONFIG", "accelerate's parallelism config")):
        if is_set(f"ACCELERATE_USE_{variable}"):
            raise ValueError(f"{name} is not supported; set distributed to ddp, fsdp or hsdp in the recipe")
    if is_set("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("FSDP version 1 has no forward-mode derivative: set fsdp_version to 2 in accelerate config")


def check_processes(recipe: Recipe, world: int) -> None:
    """Raise ``ValueError`` if so many processes cannot train the recipe, wherever they are."""
    if recipe.train_batch_size % world:
        raise ValueError(
            f"train_batch_size {recipe.train_batch_size} cannot be shared out equally over {world} processes: use a "
            f"multiple of {world}, or fewer processes"
        )
    if recipe.tangent.shared_primal and world > 1:
        raise ValueError(
            f"tangent.shared_primal needs one process, got {world}: torch.func.jvp cannot pass the forward of DDP or FSDP2; "
            "remove it"
        )


def check_launch(recipe: Recipe) -> None:
    """Look, before anything is loaded, whether the recipe can run as it was launched.

    Raises:
        ValueError: it cannot; one sentence.
    """
    check_launcher()
    world, kind = world_size(), technique(recipe)
    check_processes(recipe, world)
    if recipe.tangent.flash_attention and not (torch.cuda.is_available() and flash_attention_is_installed()):
        raise ValueError(
            "tangent.flash_attention needs a GPU and its package (pip install --no-deps jvp_flash_attention); remove it"
        )
    if recipe.compile is not None and is_sharded(recipe):
        raise ValueError(f"compile does not go with distributed: {kind}; use ddp, or remove it")
    if recipe.lora is not None and kind != "ddp":
        raise ValueError(f"lora does not go with distributed: {kind}, since teacher and student share weights; use ddp")
    if offloads(recipe) and (kind == "ddp" or world == 1):
        raise ValueError("cpu_offload needs distributed: fsdp or hsdp, and several processes; remove it")
    if kind == "hsdp" and world % local_world_size():
        raise ValueError(f"distributed: hsdp needs the same number of processes on every node, got {world} in all")
    if recipe.mixed_precision == "bf16" and not is_set("ACCELERATE_USE_CPU") and not is_bf16_available(ignore_tpu=True):
        raise ValueError("mixed_precision: bf16 needs a device that computes in bf16, which this one does not; use no")


def local_world_size() -> int:
    """The number of processes on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


@contextmanager
def accelerates_own_fsdp_off():
    """Accelerate sees the same processes without its FSDP plugin, which would shard by its own policy."""
    configured = os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        yield
    finally:
        if configured is not None:
            os.environ["ACCELERATE_USE_FSDP"] = configured


def start_processes() -> PartialState:
    """Connect the processes of this run; once, also if it is called again.

    Raises:
        ValueError: a launch that is not supported, or a device that is not there or cannot compute what is needed.
    """
    check_launcher()
    several = world_size() > 1
    cpu = is_set("ACCELERATE_USE_CPU") or (several and not torch.accelerator.is_available())
    # What is offloaded is reduced on CPUs too.
    backend = {"backend": "cpu:gloo,cuda:nccl"} if several and not cpu and torch.cuda.is_available() else {}
    try:
        with accelerates_own_fsdp_off():
            state = PartialState(cpu=cpu, **backend)
        torch.zeros(1, dtype=torch.float64, device=state.device)  # times are computed in it
    except (RuntimeError, TypeError, AssertionError) as error:
        named = os.environ.get("ACCELERATE_TORCH_DEVICE", "of this machine")
        reason = str(error).splitlines()[0]
        raise ValueError(f"the accelerator {named} cannot be used ({reason}); on CPUs: ACCELERATE_USE_CPU=1") from error
    return state


def build_accelerator(recipe: Recipe) -> Accelerator:
    """The run's ``Accelerator``.

    Raises:
        ValueError: as :func:`check_launch` and :func:`start_processes`.
    """
    check_launch(recipe)
    state = start_processes()
    AcceleratorState._reset_state()  # an earlier training of this Python session may have had another precision
    with accelerates_own_fsdp_off():
        return Accelerator(
            mixed_precision=recipe.mixed_precision, log_with=recipe.report_to, project_dir=recipe.output_dir, cpu=state._cpu
        )


# ---- blocks ----------------------------------------------------------------------------------------------------------


def blocks(network: nn.Module) -> list[nn.Module]:
    """The repeated parts of a network, outermost first: what is sharded, and recomputed, as one piece.

    They are the composite modules in a ``ModuleList`` or ``ModuleDict`` of which the network has several of one class, or
    whose class a network of diffusers names in ``_no_split_modules``.
    """
    containers = (nn.ModuleList, nn.ModuleDict)
    modules = list(network.modules())
    named = {name for module in modules for name in getattr(type(module), "_no_split_modules", None) or ()}
    listed = {child: None for container in modules if isinstance(container, containers) for child in container.children()}
    parts = [part for part in listed if not isinstance(part, containers) and next(part.children(), None) is not None]
    count = Counter(type(part) for part in parts)
    repeated = [part for part in parts if count[type(part)] > 1 or type(part).__name__ in named]
    inner = {module for part in repeated for module in part.modules() if module is not part}
    return [part for part in repeated if part not in inner]


def checkpoint_activations(network: nn.Module) -> None:
    """Keep only the inputs of each block for the backward pass, which computes the rest again: the same numbers.

    Without gradients, as in the derivative's pass, nothing changes.
    """
    for block in blocks(network):
        block.forward = recomputed(block.forward)


def recomputed(forward):
    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return wrapper


# ---- shards ----------------------------------------------------------------------------------------------------------


def device_mesh(kind: str, device: torch.device):
    """All processes in a row; for ``hsdp`` a row for each node."""
    from torch.distributed.device_mesh import init_device_mesh

    world, local = world_size(), local_world_size()
    if kind == "hsdp":
        return init_device_mesh(device.type, (world // local, local), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))


def shard(network: nn.Module, mesh, dtype: torch.dtype | None = None, cpu_offload: bool = False) -> nn.Module:
    """Shard every block of a network, and what is left of it, over a mesh; in place.

    Args:
        dtype: of the blocks' weights while they compute; their shards and gradients stay in fp32. What is around the blocks,
            the time embedding above all, stays in fp32 too, and no input is cast: a time in bf16 has no derivative.
        cpu_offload: the shards lie in the memory of the CPU.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    # Some networks return a view, which is harmless unless it is written to: nothing here writes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    widen_scalars(network)
    # Also the root is freed after a forward pass: it would otherwise go on with the weights of before an optimizer step.
    offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    options = dict(mesh=mesh, reshard_after_forward=True, offload_policy=offload)
    policy = functools.partial(MixedPrecisionPolicy, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # What a block shares with the rest of the network is gathered with that.
    shared = [network.get_submodule(name) for name in getattr(type(network), "shared_blocks", ())]
    for block in blocks(network):
        if block not in shared:
            fully_shard(block, mp_policy=policy(param_dtype=dtype), **options)
    return fully_shard(network, mp_policy=policy(), **options)


def sharded_parts(network: nn.Module) -> list[nn.Module]:
    """What is called of a network, and so gathers its shards: the native one of a teacher and of its guidance teacher."""
    natives = [module.native for module in network.modules() if isinstance(module, Teacher)]
    return natives or [network]


def widen_scalars(network: nn.Module) -> None:
    """Parameters without dimensions, which cannot be sharded, become vectors of one element: they broadcast alike."""
    for module in network.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.ndim == 0:
                setattr(module, name, nn.Parameter(p.detach().view(1), requires_grad=p.requires_grad))


def local(tensor: Tensor) -> Tensor:
    """This process' part of a tensor that may be sharded; it shares memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded in one piece; all processes must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(tensor: Tensor, example: Tensor) -> Tensor:
    """A whole tensor as ``example`` is: sharded or not, in its memory format, and of no or one dimension where it is one
    number.
    """
    tensor = tensor.reshape(example.shape) if tensor.numel() == example.numel() == 1 else tensor
    if tensor.shape != example.shape:
        return tensor
    if not hasattr(example, "full_tensor"):
        if tensor.stride() == example.stride():
            return tensor
        # A fused optimizer pairs moments with weights by their places in memory.
        return torch.empty_like(example, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    from torch.distributed.tensor import distribute_tensor

    # Every process has read the whole tensor and cuts out its own part.
    return distribute_tensor(tensor.to(example.device), example.device_mesh, example.placements, src_data_rank=None)


def whole_state(module: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """A module's state on the CPU in one piece, one tensor after the other; all processes must ask for it.

    Args:
        keep: false on processes that need no result.
    """
    gathered = ((key, whole(tensor.detach())) for key, tensor in module.state_dict().items())
    return {key: tensor.cpu().contiguous() for key, tensor in gathered if keep}


def whole_optimizer_state(optimizer: torch.optim.Optimizer, keep: bool = True) -> dict:
    """As :func:`whole_state`, for an optimizer; where nothing is sharded, as ``state_dict`` has it."""
    state = optimizer.state_dict()
    gathered = {}
    for index, values in state["state"].items():
        pieces = {key: whole(value) if torch.is_tensor(value) else value for key, value in values.items()}
        if keep:
            gathered[index] = {key: v.cpu() if v is not values[key] else v for key, v in pieces.items()}
    return {**state, "state": gathered}


def load_state(module: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Restore what :func:`whole_state` returned, whatever the number of processes was.

    Raises:
        ValueError: tensors that do not fit, as :func:`teachers.pretrained.load_tensors`.
    """
    state = module.state_dict()
    load_tensors(module, {key: like(t, state[key]) if key in state else t for key, t in tensors.items()}, where)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Restore what :func:`whole_optimizer_state` returned, whatever the number of processes was."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    placed = {
        index: {key: like(v, parameters[index]) if torch.is_tensor(v) and key != "step" else v for key, v in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": placed})


def skeleton(network: nn.Module) -> nn.Module:
    """A copy without weights, to be filled with those that :func:`whole_state` gathers."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in network.parameters()}
    return copy.deepcopy(network, memo)


class Placement:
    """Where the networks of a run lie.

    Args:
        accelerator: of the run.
        recipe: says how.
    """

    def __init__(self, accelerator: Accelerator, recipe: Recipe):
        self.accelerator, self.recipe, self.device = accelerator, recipe, accelerator.device
        self.world = accelerator.num_processes
        self.sharded = is_sharded(recipe)
        self.kind = technique(recipe) if self.sharded else "ddp"
        self.mesh = device_mesh(self.kind, self.device) if self.sharded else None
        self.skeletons: dict[nn.Module, nn.Module] = {}

    def rearranges(self, network: nn.Module) -> bool:
        """Whether :meth:`place` changes more of a network than the device."""
        return self.sharded or (self.device.type == "cpu" and bool(channels_last_parts(network)))

    def place(self, network: nn.Module, autocast: bool = False) -> nn.Module:
        """Bring a network to where it computes, in place.

        Args:
            autocast: whether it only ever runs in the recipe's precision. Then blocks of diffusers are gathered in it, which
                halves what is sent; those of our networks compute in part in fp32, and need their weights in it.
        """
        if not self.sharded:
            return fast_weights(network.to(self.device))
        self.skeletons[network] = skeleton(network)
        bf16 = autocast and self.recipe.mixed_precision == "bf16"
        for part in sharded_parts(network):
            dtype = torch.bfloat16 if bf16 and isinstance(part, OF_DIFFUSERS) else None
            shard(part, self.mesh, dtype, offloads(self.recipe))
        for part in network.modules():
            if getattr(part, "null_prompt", None) is not None:  # a guidance teacher has one too
                part.null_prompt = part.null_prompt.to(self.device)
        return network

    def prepare(self, network: Teacher, build_optimizer, weightings: list[nn.Module]) -> tuple:
        """A network that is trained, its optimizer, and the weightings that it trains too, made ready for training.

        Args:
            build_optimizer: makes the optimizer of a list of parameters.
        """
        if checkpoints_activations(self.recipe):
            checkpoint_activations(network.native)
        if self.sharded:
            network = self.accelerator.prepare_model(self.place(network, autocast=True), False, evaluation_mode=True)
            for weighting in weightings:
                self.place(weighting)
        else:
            network = self.place(network)  # before its optimizer is built, whose moments are arranged as the weights are
        parameters = [p for module in (network, *weightings) for p in module.parameters() if p.requires_grad]
        optimizer = build_optimizer(parameters)  # as it is: Accelerate's wrapper takes no found_inf
        if not self.sharded:
            network, *weightings = map(self.accelerator.prepare_model, (network, *weightings))
        return network, optimizer, *weightings

    def synchronization(self, prepared: nn.Module, last: bool):
        """Gradients are reduced over processes in the last part of an accumulated step only. Those of shards always are: the
        gradients of the whole network would have to be held otherwise.
        """
        return torch.enable_grad() if last or self.sharded else self.accelerator.no_sync(prepared)

    def gathered(self, network: Teacher) -> Teacher:
        """The network in one piece, on the main process; all must ask for it. Elsewhere it has no weights."""
        if network not in self.skeletons:
            return network.to(memory_format=torch.contiguous_format)
        main = self.accelerator.is_main_process
        tensors, copied = whole_state(network, keep=main), copy.deepcopy(self.skeletons[network])
        if main:
            tensors = {key: tensors[key].reshape(value.shape) for key, value in copied.state_dict().items()}
            copied.load_state_dict(tensors, assign=True)
            copied.to(self.device)
        return copied.train(network.training)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes."""
        if self.world == 1:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values / self.world
