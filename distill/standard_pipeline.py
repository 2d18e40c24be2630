"""Students as pipelines of diffusers' own classes, which load with neither this package nor code of the folder's.

Three families have one, besides those of text (:mod:`distill.text_pipeline`). A network of noise levels by DDPM's steps is
stepped by ``LCMScheduler``: with its skip connection shrunk to nothing, a step is the consistency function at that level
followed by new noise. OpenAI's U-Net is stepped by ``CMStochasticIterativeScheduler``, which with ``sigma_min`` 0 is the
consistency function in EDM's preconditioning.
"""

import math
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch

from distill.latents import load_vae, vae_folder
from distill.schedule import student_times
from distill.trigflow import max_time
from distill.unet2d import as_unet2d
from teachers import Teacher, hub
from teachers.diffusers import BETA_SCHEDULES, INDEX, VP_PREDICTIONS, read_json

STEPS = (1, 2, 4)  # numbers of steps of which the card gives the times
INSTEAD = "export it with format scm (--format scm)"
SIGMA_MAX, RHO, NUM_LEVELS = 80.0, 7.0, 1000  # of the scheduler of consistency models


def standard_pipeline(model: Teacher, facts: dict, vae: str | Path | None) -> tuple[diffusers.DiffusionPipeline, dict, str]:
    """The pipeline, what else belongs into its ``model_index.json``, and the lines of the card's example.

    Raises:
        ValueError: no pipeline of diffusers has this network or its convention, or a VAE is missing.
    """
    name = type(model.native).__name__
    if name not in PIPELINES:
        have = f"{', '.join(PIPELINES)}, DiffusersText"
        raise ValueError(f"no pipeline of diffusers has a {name}, only {have}; {INSTEAD}")
    return PIPELINES[name](model, facts, vae)


def dit_pipeline(model: Teacher, facts: dict, vae: str | Path | None):
    scheduler = lcm_scheduler(model)
    transformer = copy_network(model, diffusers.DiTTransformer2DModel)
    pipe = diffusers.DiTPipeline(transformer, read_vae(model, facts, vae), scheduler)
    labels = [i % model.num_classes for i in range(4)]
    call = f"class_labels={labels}, guidance_scale=1.0, num_inference_steps=2"
    # The pipeline gives its generator to the first noise only.
    return pipe, class_names(facts), f"{lcm_lines(model, facts)}torch.manual_seed(0)\nimages = pipe({call}).images"


def ddpm_pipeline(model: Teacher, facts: dict, vae: str | Path | None):
    refuse_vae(vae)
    if model.num_classes is not None:
        raise ValueError(f"DDPMPipeline has no labels and cannot sample a class-conditional network; {INSTEAD}")
    scheduler = lcm_scheduler(model)
    pipe = diffusers.DDPMPipeline(copy_network(model, diffusers.UNet2DModel), scheduler)
    call = "batch_size=4, num_inference_steps=2, generator=torch.Generator().manual_seed(0)"
    return pipe, {}, f"{lcm_lines(model, facts)}images = pipe({call}).images"


def consistency_pipeline(model: Teacher, facts: dict, vae: str | Path | None):
    refuse_vae(vae)
    convention = model.parameterization
    if (convention.family, convention.prediction, convention.time, convention.time_scale) != (
        "edm", "raw", "log_sigma/4", 1000.0,
    ):  # fmt: skip
        raise ValueError(f"ConsistencyModelPipeline has EDM's preconditioning and time 250 log(sigma) only; {INSTEAD}")
    scheduler = diffusers.CMStochasticIterativeScheduler(
        num_train_timesteps=NUM_LEVELS, sigma_min=0.0, sigma_max=SIGMA_MAX, rho=RHO, clip_denoised=False,
        sigma_data=convention.teacher_sigma_data or model.sigma_data,
    )  # fmt: skip
    pipe = diffusers.ConsistencyModelPipeline(as_unet2d(model.native), scheduler)
    labels = "" if model.num_classes is None else f", class_labels={[i % model.num_classes for i in range(4)]}"
    call = f"batch_size=4{labels}, num_inference_steps=None, timesteps=timesteps[2]"
    steps = {n: noise_levels(times, model.sigma_data) for n, times in recommended_times(model, facts).items()}
    return pipe, {}, (
        f"timesteps = {steps}  # by number of steps\n"
        f"images = pipe({call},\n              generator=torch.Generator().manual_seed(0)).images"
    )


PIPELINES: dict[str, Callable] = {
    "DiffusersDiT": dit_pipeline, "DiffusersUNet2D": ddpm_pipeline, "OpenAIUNet": consistency_pipeline,
}  # fmt: skip


def copy_network(model: Teacher, cls: type) -> diffusers.ModelMixin:
    """A network of diffusers out of ours around it, without the outputs of a learned variance where it is dropped."""
    own, tensors = model.native.config["config"], model.native.model.state_dict()
    if cls is diffusers.UNet2DModel:  # DDPMPipeline has no place for them, DiTPipeline has
        channels = own["in_channels"]
        own = {**own, "out_channels": channels}
        tensors |= {key: tensors[key][:channels] for key in ("conv_out.weight", "conv_out.bias")}
    network = cls.from_config(own)
    network.load_state_dict(tensors)
    return network.eval()


def lcm_scheduler(model: Teacher) -> diffusers.LCMScheduler:
    """The network's own noise schedule, from which steps are evenly spaced up to noise level 80 where sampling starts.

    Raises:
        ValueError: the network is not one of DDPM's steps.
    """
    convention = model.parameterization
    schedules = {ours: theirs for theirs, ours in BETA_SCHEDULES.items()}
    if convention.time not in schedules or convention.time_scale != 1.0:
        name, own = type(model.native).__name__, f"{convention.family} {convention.prediction} at time {convention.time!r}"
        raise ValueError(f"few-step pipelines of diffusers take a {name} of DDPM's steps, not {own}; {INSTEAD}")
    schedule = {**convention.schedule, "num_train_timesteps": int(convention.schedule["num_train_timesteps"])}
    (first,) = ddpm_steps(model, [max_time(model.sigma_data)])
    return diffusers.LCMScheduler(
        **schedule,
        beta_schedule=schedules[convention.time],
        prediction_type={ours: theirs for theirs, ours in VP_PREDICTIONS.items()}[convention.prediction],
        # More than half of all steps, or the scheduler leaves out every other one.
        original_inference_steps=max(first + 1, schedule["num_train_timesteps"] // 2 + 1),
        clip_sample=False,
        timestep_scaling=1e4,  # at step 1 the sample itself contributes 2.5e-9
    )


def ddpm_steps(model: Teacher, times: list[float]) -> list[int]:
    """The steps nearest to TrigFlow times, decreasing. Step 0, where ``LCMScheduler`` has the identity, is none of them."""
    t = torch.tensor(times, dtype=torch.float64)
    steps = model.parameterization.coefficients(t, model.sigma_data).time.round().clamp(min=1)
    return sorted({int(step) for step in steps}, reverse=True)


def noise_levels(times: list[float], sigma_data: float) -> list[int]:
    """The indices nearest to TrigFlow times on ``CMStochasticIterativeScheduler``'s grid, whose index 0 is the noisiest and
    comes last.
    """
    ramp = [1 - (sigma_data * math.tan(t) / SIGMA_MAX) ** (1 / RHO) for t in times]
    return sorted({round((NUM_LEVELS - 1) * r) for r in ramp}, reverse=True)


def recommended_times(model: Teacher, facts: dict) -> dict[int, list[float]]:
    """Sampling times in radians by number of steps: those found for this student, or the defaults."""
    found = facts.get("sampling") or {}
    return {n: found.get(str(n)) or student_times(n, model.sigma_data) for n in STEPS}


def lcm_lines(model: Teacher, facts: dict) -> str:
    """The card's lines that give a pipeline, which asks for a number of steps only, the recommended ones."""
    steps = {n: ddpm_steps(model, times) for n, times in recommended_times(model, facts).items()}
    return (
        "# Times by number of steps. Sampling starts at noise level 80: ignore a warning that this is not the last step.\n"
        "# Without these three lines, steps are evenly spaced.\n"
        f"timesteps = {steps}\n"
        "set_timesteps = pipe.scheduler.set_timesteps\n"
        "pipe.scheduler.set_timesteps = lambda steps: set_timesteps(timesteps=timesteps[steps])\n"
    )


def refuse_vae(vae: str | Path | None) -> None:
    if vae is not None:
        raise ValueError("a VAE (--vae) belongs to the pipeline of a DiffusersDiT only; leave it out")


def read_vae(model: Teacher, facts: dict, vae: str | Path | None) -> diffusers.AutoencoderKL:
    """The VAE of a folder, which may be a pipeline's, or by default of the teacher's pipeline; on disk or on the hub.

    Raises:
        FileNotFoundError, ValueError: none is there, it is damaged, or of other latents.
    """
    teacher = facts.get("teacher")
    source = teacher if vae is None else vae
    folder = None if source is None else vae_folder(source).resolve()
    if vae is None and (folder is None or folder.name != "vae"):
        looked = "what the network was loaded from" if teacher is None else f"the teacher {teacher!r}"
        raise ValueError(
            f"DiTPipeline needs the VAE of its latents, and {looked} is no pipeline folder that has it; name "
            f"its folder (--vae FOLDER) or {INSTEAD}"
        )
    found = load_vae(folder)
    if not isinstance(found, diffusers.AutoencoderKL):
        raise ValueError(f"{folder} is of a {type(found).__name__}; a DiTPipeline takes an AutoencoderKL")
    channels, latents = model.sample_shape[0], found.config.latent_channels
    if latents != channels:
        raise ValueError(f"{folder} is a VAE of {latents} latent channels, but this model has {channels}")
    return found


def class_names(facts: dict) -> dict:
    """``id2label`` of the teacher's pipeline, by which ``pipe.get_label_ids`` knows classes by name, if it has one."""
    teacher = facts.get("teacher")
    if teacher is None:
        return {}
    try:
        index = (hub.fetch(teacher, [INDEX]) if hub.is_hub(teacher) else Path(teacher)) / INDEX
    except FileNotFoundError:  # a pipeline that is gone, whose VAE was named apart
        return {}
    names = read_json(index).get("id2label") if index.is_file() else None
    return {"id2label": names} if names else {}
