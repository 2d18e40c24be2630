"""Students that are their teacher plus low-rank adapters (LoRA, arXiv 2106.09685), by ``peft``.

A layer ``W x`` becomes ``W x + alpha / rank B A x`` with ``B`` zero at the start. ``W`` is the teacher's own tensor, not a
copy: teacher, student and every average hold it once together, and only ``A`` and ``B`` are trained, averaged and kept in
checkpoints. A finished student is saved merged, as an ordinary network; its adapters alone go into a file that pipelines of
diffusers read with ``load_lora_weights``.
"""

import copy
import importlib.util
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.recipe import LoRAConfig
from teachers import Teacher
from teachers.base import unfreeze
from teachers.pretrained import resolve, write_atomically

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights looks for in a folder
ADAPTER = "default"
MARK = {"_exported_by": "scm-distill"}  # in the header of the file
# Networks of diffusers whose pipelines have load_lora_weights -> the component that holds them.
LOADED_AS = {
    "SD3Transformer2DModel": "transformer", "FluxTransformer2DModel": "transformer", "SanaTransformer2DModel": "transformer",
    "AuraFlowTransformer2DModel": "transformer", "Lumina2Transformer2DModel": "transformer",
    "QwenImageTransformer2DModel": "transformer", "WanTransformer3DModel": "transformer", "UNet2DConditionModel": "unet",
}  # fmt: skip


def sharing_student(pretrained: Teacher, guidance_embedding: bool = False) -> Teacher:
    """As :meth:`teachers.Teacher.student`, but with the parameters of ``pretrained`` itself.

    Raises:
        ValueError: ``guidance_embedding`` for a network that has no guidance input yet.
    """
    if guidance_embedding and not pretrained.accepts_guidance:
        raise ValueError("lora trains no guidance input; give guidance_scale as a number, or train all weights")
    native = copy.deepcopy(pretrained.native, {id(p): p for p in pretrained.native.parameters()})
    return pretrained.twin(native=native, guidance_scale=1.0, guidance_interval=None, guidance_teacher=None)


def add_adapters(native: nn.Module, config: LoRAConfig, seed: int) -> None:
    """Put adapters into a network and freeze the rest of it.

    Args:
        seed: of the random ``A``.

    Raises:
        ValueError: ``peft`` is not installed, or a target module is not there or has no weights to adapt; one sentence.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError("lora needs a package: pip install scm-distill[lora]")
    import peft  # optional, and slow

    check_targets(native, config.target_modules)
    own = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=config.target_modules, lora_dropout=config.dropout
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(own, native, ADAPTER)
    except ValueError as error:
        raise ValueError(
            f"lora.target_modules: {', '.join(config.target_modules)} of {type(native).__name__} are not all linear or "
            "convolution layers of torch, which peft adapts"
        ) from error


def check_targets(native: nn.Module, targets: list[str]) -> None:
    """Raise ``ValueError`` unless each target is a module's name or its end, as ``peft`` understands it."""
    names = [name for name, _ in native.named_modules()]
    missing = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if missing:
        linear = [name for name, module in native.named_modules() if isinstance(module, nn.Linear)]
        ends = sorted({".".join(part for part in name.split(".")[-2:]) for name in linear})
        raise ValueError(
            f"lora.target_modules: {type(native).__name__} has no module {missing[0]!r}; its linear layers end in "
            f"{', '.join(ends[:20]) or 'nothing'}"
        )


def adapted_layers(native: nn.Module) -> dict[str, nn.Module]:
    """The layers with an adapter by name; none for an ordinary network."""
    return {name: module for name, module in native.named_modules() if hasattr(module, "lora_A")}


def adapters(native: nn.Module) -> nn.ModuleDict:
    """The adapters alone, as a module around the same tensors."""
    layers = adapted_layers(native)
    return nn.ModuleDict({
        name.replace(".", "/"): nn.ModuleDict({"A": layer.lora_A[ADAPTER], "B": layer.lora_B[ADAPTER]})
        for name, layer in layers.items()
    })  # fmt: skip


@torch.no_grad()
def merged(student: Teacher) -> Teacher:
    """The same function without adapters: an ordinary network with weights ``W + alpha / rank B A`` of its own."""
    native = copy.deepcopy(student.native)
    for name, layer in adapted_layers(native).items():
        layer.merge()
        native.set_submodule(name, layer.get_base_layer())
    del native.peft_config
    unfreeze(native)
    return student.twin(native=native)


def component_of(native: nn.Module) -> str | None:
    """Where pipelines keep this network if they read adapters for it, ``transformer`` or ``unet``; else ``None``."""
    config = getattr(native, "config", {})
    return None if config.get("trigflow_time") else LOADED_AS.get(config.get("cls"))  # theirs has another embedding


def adapters_file(student: Teacher) -> Path:
    """What :func:`write_adapters` wrote for a student that was loaded from its run.

    Raises:
        ValueError: no pipeline reads adapters for its network, or none are there.
    """
    name = student.native.config.get("cls", type(student.native).__name__)
    if component_of(student.native) is None:
        raise ValueError(f"no pipeline of diffusers reads adapters for a {name}; export its merged weights (--format scm)")
    file = resolve(student.source) / LORA_WEIGHTS if student.source else Path(LORA_WEIGHTS)
    if not file.is_file():
        owner = student.source or "this model"
        raise ValueError(f"{owner} has no {LORA_WEIGHTS}: name the run of a student trained with lora")
    return file


def write_adapters(folder: Path, student: Teacher) -> Path | None:
    """The adapters of a network of diffusers as its pipelines read them; ``None`` if there is no such pipeline.

    ``alpha / rank`` is multiplied into ``B``, so that the file means the same to readers that do not ask for it.
    """
    component = component_of(student.native)
    if component is None:
        return None
    tensors: dict[str, Tensor] = {}
    for name, layer in adapted_layers(student.native).items():
        key = f"{component}.{name.removeprefix('model.')}"
        tensors[f"{key}.lora_A.weight"] = layer.lora_A[ADAPTER].weight.detach().cpu().float().contiguous()
        tensors[f"{key}.lora_B.weight"] = (layer.scaling[ADAPTER] * layer.lora_B[ADAPTER].weight.detach()).cpu().float()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / LORA_WEIGHTS, lambda path: save_file(tensors, path, {"format": "pt", **MARK}))
    return folder / LORA_WEIGHTS
