"""Students of text as their teacher's own pipeline: its text encoders and autoencoder, the student's network, and a
scheduler whose step is consistency sampling; and what to do with that pipeline to use the student's adapters in it.

A flow student is stepped by ``FlowMatchEulerDiscreteScheduler`` with ``stochastic_sampling``, which takes ``x0 = x_s - s v``
and noises it anew to the next ``s``; a VP student by ``LCMScheduler``. Sana with a guidance input is ``SanaSprintPipeline``,
whose ``SCMScheduler`` has TrigFlow's own times.
"""

import json
import math
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin, SCMScheduler

from distill.standard_pipeline import ddpm_steps, lcm_scheduler, recommended_times
from teachers import Teacher, hub
from teachers.diffusers import COMPONENTS, INDEX, is_diffusers_folder, read_json

LINKED = (".safetensors", ".bin")  # files large enough to be worth it
SPRINT = "SanaSprintPipeline"
VIDEO = "WanTransformer3DModel"
HERE = "it can be sampled here only (distill sample)"
# Pipelines whose classifier-free guidance is not switched off by guidance_scale=1.
GUIDANCE_OFF = {"QwenImageTransformer2DModel": "true_cfg_scale=1.0"}


class FewSteps(NamedTuple):
    """How a pipeline samples a student."""

    scheduler: SchedulerMixin
    lines: str  # the card's, before the call
    arguments: str  # of the call, for two steps
    pipeline: str | None = None  # a class in place of the teacher's


def is_text_network(model: Teacher) -> bool:
    return type(model.native).__name__ == "DiffusersText"


def few_steps(model: Teacher, facts: dict) -> FewSteps:
    """Scheduler and times of a student.

    Raises:
        ValueError: its convention is none of a pipeline's.
    """
    convention = model.parameterization
    times = recommended_times(model, facts)
    if convention.time == "trigflow":
        raise ValueError(f"this student's time embedding is not its pipeline's (objective retrofit); {HERE}")
    if convention.family != "flow":
        steps = {n: ddpm_steps(model, found) for n, found in times.items()}
        lines = f"{LCM_LINE}timesteps = {steps}  # by number of steps\n"
        return FewSteps(lcm_scheduler(model), lines, "timesteps=timesteps[2]")
    levels = {n: flow_levels(found, model.sigma_data) for n, found in times.items()}
    if model.native.cls == "SanaTransformer2DModel" and model.accepts_guidance:
        return sprint_steps(model, levels)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=True)
    lines = f"sigmas = {levels}  # by number of steps; the pipeline's own are for many of them\n"
    if model.native.cls == VIDEO:  # its pipeline asks for a number of steps only
        lines += (
            "set_timesteps = pipe.scheduler.set_timesteps\n"
            "pipe.scheduler.set_timesteps = lambda steps, device=None: set_timesteps(sigmas=sigmas[steps], device=device)\n"
        )
    arguments = "num_inference_steps=2" if model.native.cls == VIDEO else "sigmas=sigmas[2]"
    return FewSteps(scheduler, lines + NOISE_LINE, arguments)


LCM_LINE = "# Sampling starts at noise level 80: ignore a warning that this is not the last step.\n"
NOISE_LINE = "torch.manual_seed(0)  # the pipeline gives its generator to the first noise only\n"


def flow_levels(times: list[float], sigma_data: float) -> list[float]:
    """TrigFlow times as ``s`` of ``x_s = (1 - s) x0 + s eps``. The first is 1: every pipeline starts from noise alone."""
    levels = [sigma_data * math.sin(t) / (math.cos(t) + sigma_data * math.sin(t)) for t in times]
    return [1.0, *(round(s, 4) for s in levels[1:])]


def sprint_steps(model: Teacher, levels: dict[int, list[float]]) -> FewSteps:
    """``SanaSprintPipeline`` samples in TrigFlow with latents of unit standard deviation: ``tan t = s / (1 - s)``.

    Raises:
        ValueError: a network whose time is not ``s`` itself.
    """
    if model.parameterization.time_scale != 1.0:
        scale = model.parameterization.time_scale
        raise ValueError(f"{SPRINT} takes a network with times from 0 to 1, this student's go up to {scale:g}; {HERE}")
    times = {n: [round(math.atan2(s, 1 - s), 4) for s in found] for n, found in levels.items()}
    lines = (
        f"timesteps = {times}  # by number of steps\n"
        "set_timesteps = pipe.scheduler.set_timesteps\n"
        "pipe.scheduler.set_timesteps = lambda steps, device=None, **_: set_timesteps(\n"
        "    steps, [*timesteps[steps], 0.0], device, max_timesteps=None, intermediate_timesteps=None\n)\n"
        "generator = torch.Generator().manual_seed(0)\n"
    )
    # A number other than 2 also needs intermediate_timesteps=None.
    return FewSteps(SCMScheduler(), lines, "num_inference_steps=2, generator=generator", SPRINT)


def call_line(model: Teacher, facts: dict, few: FewSteps) -> str:
    """The call of the card's example."""
    scale = (facts.get("guidance_range") or [1.0])[0] if model.accepts_guidance else 1.0
    guidance = GUIDANCE_OFF.get(model.native.cls, f"guidance_scale={scale}")
    size = ""
    if tuple(model.sample_shape) != tuple(model.native.default_sample_shape):
        factor = "pipe.vae_scale_factor_spatial" if model.native.cls == VIDEO else "pipe.vae_scale_factor"
        height, width = (f"{side} * {factor}" for side in model.sample_shape[-2:])
        size = f"height={height}, width={width}, "
    if model.native.cls == VIDEO:
        size += f"num_frames={model.sample_shape[1] - 1} * pipe.vae_scale_factor_temporal + 1, "
    result = "frames" if model.native.cls == VIDEO else "images"
    return f'images = pipe("a photo of a lighthouse", {size}{guidance}, {few.arguments}).{result}'


def text_example(model: Teacher, facts: dict) -> str:
    """The card's lines that sample from an exported pipeline."""
    few = few_steps(model, facts)
    return few.lines + call_line(model, facts, few)


def adapter_example(model: Teacher, facts: dict) -> str:
    """The card's lines that put adapters and scheduler into the teacher's pipeline and sample from it."""
    few = few_steps(model, facts)
    name = type(few.scheduler).__name__
    defaults = type(few.scheduler)().config
    changed = {k: v for k, v in few.scheduler.config.items() if k in defaults and v != defaults[k] and not k.startswith("_")}
    scheduler = f"diffusers.{name}({', '.join(f'{key}={value!r}' for key, value in changed.items())})"
    load = 'pipe.load_lora_weights("path/to/this/folder")'
    return f"{load}\npipe.scheduler = {scheduler}\n{few.lines}{call_line(model, facts, few)}"


def teacher_pipeline(model: Teacher, facts: dict, pipeline: str | Path | None) -> tuple[Path, str]:
    """The folder of the pipeline that the student's network goes into, and the component that this replaces.

    Raises:
        ValueError: no such folder, or a pipeline of another network.
    """
    named = pipeline or facts.get("teacher")
    folder = fetched(named) if named and hub.is_hub(named) else Path(named or "")
    name = model.native.cls
    if not is_diffusers_folder(folder):
        which = f"{str(named)!r} is no pipeline folder" if named else "it is not known"
        raise ValueError(
            f"a {name} goes into its teacher's pipeline, which has the text encoders, but {which}; name it "
            "(--pipeline FOLDER)"
        )
    index = read_json(folder / INDEX)
    component = next((key for key in COMPONENTS if index.get(key) == ["diffusers", name]), None)
    if component is None:
        raise ValueError(f"{folder} is a {index['_class_name']} without a {name}, which this student is")
    return folder, component


def fetched(source: str | Path) -> Path:
    """The local copy of a pipeline on the hub, without its network.

    Raises:
        ValueError, OSError: see :func:`teachers.hub.fetch`.
    """
    index = read_json(hub.fetch(source, [INDEX]) / INDEX)
    kept = components(index) - {*COMPONENTS, "scheduler"}
    return hub.fetch(source, [INDEX, *(f"{name}/*" for name in sorted(kept))])


def write_text_pipeline(model: Teacher, folder: Path, facts: dict, pipeline: str | Path | None) -> str:
    """Write the teacher's pipeline with the student in it; returns the name of its class. Weights of the other components
    are linked to those of the teacher where the disk allows it, and copied where not.

    Raises:
        FileNotFoundError, ValueError: see :func:`few_steps` and :func:`teacher_pipeline`; or a component is missing.
    """
    few = few_steps(model, facts)
    source, component = teacher_pipeline(model, facts, pipeline)
    index = read_json(source / INDEX)
    if few.pipeline is not None:
        index["_class_name"] = few.pipeline
    index["_diffusers_version"] = diffusers.__version__
    index["scheduler"] = ["diffusers", type(few.scheduler).__name__]
    plain_network(model).save_pretrained(folder / component)
    few.scheduler.save_pretrained(folder / "scheduler")
    for name in components(index) - {component, "scheduler"}:
        if not (source / name).is_dir():
            raise FileNotFoundError(f"{source} has no folder {name}, which its {INDEX} names")
        shutil.copytree(source / name, folder / name, copy_function=link_or_copy)
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return index["_class_name"]


def components(index: dict) -> set[str]:
    """The names of a pipeline's components that are there, which are its folders."""
    return {name for name, value in index.items() if isinstance(value, list) and len(value) == 2 and value[0]}


def link_or_copy(source: str, target: str) -> None:
    source = os.path.realpath(source)  # the files of a Hub cache are links
    if source.endswith(LINKED):
        try:
            return os.link(source, target)
        except OSError:  # another disk, or one without links
            pass
    shutil.copyfile(source, target)


def plain_network(model: Teacher) -> diffusers.ModelMixin:
    """The network as diffusers builds it, around the student's own tensors in fp32."""
    with torch.device("meta"):
        network = getattr(diffusers, model.native.cls).from_config(model.native.config["config"])
    tensors = {key: value.detach().cpu().float() for key, value in model.native.model.state_dict().items()}
    network.load_state_dict(tensors, assign=True)
    return network
