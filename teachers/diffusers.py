"""Teachers from diffusers pipeline folders, read from what their scheduler and model configs say, and for what these cannot
say (a pipeline's own factor on the time, a reversed time) from a table by the class of the network.

A pipeline's scheduler tells what the network predicts and what its time means; only its sampling grid, which shifts and
spacings belong to, is not needed: a student has its own. Every component is a class of diffusers itself; no code in the
folder is run.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teachers.networks.diffusers_text import TEXT_NETWORKS, DiffusersText
from teachers.parameterization import EDM, Parameterization
from teachers.unfilled import TABLES, Unfilled

INDEX = "model_index.json"
MAX_TRAIN_TIMESTEPS = 1_000_000  # published models have 1,000
MAX_JSON = 16 * 2**20  # bytes; a manifest of a thousand files has 100,000
COMPONENTS = ("unet", "transformer")  # where pipelines keep the network
SCHEDULER = "scheduler_config.json"
# What a pipeline says of itself, in small files. Old ones have all their parts in one folder.
DESCRIPTIONS = (
    INDEX, "config.json", SCHEDULER, f"scheduler/{SCHEDULER}", *(f"{component}/config.json" for component in COMPONENTS)
)  # fmt: skip
# Class in diffusers -> our network around it.
NETWORKS = {
    "UNet2DModel": "DiffusersUNet2D", "DiTTransformer2DModel": "DiffusersDiT",
    **dict.fromkeys(TEXT_NETWORKS, "DiffusersText"),
}  # fmt: skip
DISTILLED = {
    "LCMScheduler", "TCDScheduler", "SCMScheduler", "CMStochasticIterativeScheduler", "FlowMatchLCMScheduler",
    "FlowMapEulerDiscreteScheduler", "HeliosDMDScheduler", "PiflowScheduler",
}  # fmt: skip
TURBO = {"EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"}
FLOW = {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"}
EDM_SCHEDULERS = {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"}
VP_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
BETA_SCHEDULES = {"linear": "ddpm_linear", "scaled_linear": "ddpm_scaled_linear", "squaredcos_cap_v2": "ddpm_cosine"}
# What a flow pipeline makes of its scheduler's time, 1000 s, for its network: a factor.
TIME_FACTORS: dict[str, Callable] = {
    "FluxTransformer2DModel": lambda config: 1 / 1000,
    "AuraFlowTransformer2DModel": lambda config: 1 / 1000,
    "QwenImageTransformer2DModel": lambda config: 1 / 1000,
    "SanaTransformer2DModel": lambda config: config["timestep_scale"],
}
FROM_DATA = {"Lumina2Transformer2DModel"}  # time 1 is data and the output x0 - eps, whatever the scheduler says
EITHER_FAMILY = {"UNet2DConditionModel", "PixArtTransformer2DModel"}  # the others are flow networks
PIXEL_SIGMA_DATA, LATENT_SIGMA_DATA = 0.5, 1.0  # unless a recipe or the scheduler says otherwise


def is_diffusers_folder(path: Path) -> bool:
    """Whether this is a saved pipeline made of diffusers' own classes (an exported student is not)."""
    index = path / INDEX
    return index.is_file() and isinstance(read_json(index).get("_class_name"), str)


def read_json_value(path: Path) -> Any:
    """Any JSON value.

    Raises:
        ValueError: malformed JSON or UTF-8, or more of it than files of this kind have.
    """
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path} is not valid JSON for a model or a folder of data: it is larger than {MAX_JSON >> 20} MiB")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: it is nested too deeply") from None


def read_json(path: Path) -> dict:
    value = read_json_value(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a mapping")
    return value


def read_diffusers(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """``config.json`` as a value, and the tensors, of a pipeline's network.

    Raises:
        ValueError: a pipeline, network or scheduler that is not supported, or damaged files; one sentence.
    """
    index = read_json(path / INDEX)
    component, name = network_of(index, path)
    scheduler = load_scheduler(path, class_name(index, "scheduler", path))
    convention, sigma_data = scheduler_convention(scheduler)
    model = load_network(path, component, name)
    own = json.loads(json.dumps({key: value for key, value in model.config.items() if not key.startswith("_")}))
    if own.get("time_embedding_type", "positional") != "positional":
        kind = own["time_embedding_type"]
        raise ValueError(f"{path}: its {component} has a {kind} time embedding; positional ones are supported")
    if name in TEXT_NETWORKS:
        check_not_distilled(path, name, own, scheduler)
        check_one_network(path, index)
        convention = text_convention(path, name, own, convention)
        facts = text_facts(path, name, own)
    else:
        size = own["sample_size"]
        facts = {
            "network_config": {"config": own},
            "sample_shape": [own["in_channels"], *(size if isinstance(size, list) else (size, size))],
            "num_classes": own.get("num_class_embeds") if name == "UNet2DModel" else own["num_embeds_ada_norm"],
        }
    latents = any(index.get(name) not in (None, [None, None]) for name in ("vae", "vqvae"))  # [null, null]: left out
    config = {
        "role": "teacher",
        "network": NETWORKS[name],
        "parameterization": convention.to_dict(),
        "sigma_data": sigma_data or (LATENT_SIGMA_DATA if latents else PIXEL_SIGMA_DATA),
        "label_format": "index",
        **facts,
        **({"latents": True} if latents and facts["sample_shape"][0] in (1, 3) else {}),
    }
    return config, {f"model.{key}": value.float() for key, value in model.state_dict().items()}


def network_of(index: dict, path: Path) -> tuple[str, str]:
    """The component that is a pipeline's network, and its class.

    Raises:
        ValueError: there is none, or none that is supported.
    """
    component = next((name for name in COMPONENTS if name in index), None)
    if component is None:
        raise ValueError(f"{path} is a {index['_class_name']} without a {' or '.join(COMPONENTS)}")
    name = class_name(index, component, path)
    if name not in NETWORKS:
        raise ValueError(f"{path}: its {component} is a {name}; supported: {', '.join(NETWORKS)}")
    return component, name


def network_folder(path: Path) -> Path:
    """Where a pipeline keeps its network; see :func:`network_of`."""
    return component_folder(path, network_of(read_json(path / INDEX), path)[0])


def component_folder(path: Path, component: str) -> Path:
    """The folder of a pipeline's component: one of its own, or the pipeline's."""
    return path / component if (path / component).is_dir() else path


def text_facts(path: Path, name: str, own: dict) -> dict:
    """What the config of a network of texts says of it; its samples are of the size that its pipeline draws by default."""
    try:
        with torch.device("meta"):
            network = DiffusersText(name, own)
        shape = network.default_sample_shape
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return {"network_config": {"cls": name, "config": own}, "sample_shape": list(shape), "num_classes": None}


def text_convention(path: Path, name: str, own: dict, convention: Parameterization) -> Parameterization:
    """The convention of the scheduler, with what the pipeline does between its scheduler and its network.

    Raises:
        ValueError: a flow network by another scheduler.
    """
    if convention.family != "flow":
        if name in EITHER_FAMILY:
            return convention
        raise ValueError(f"{path}: a {name} is a flow network, but the scheduler is of another family ({convention.family})")
    if name in FROM_DATA:
        return Parameterization("flow", "-velocity", "1-s")
    factor = TIME_FACTORS[name](own) if name in TIME_FACTORS else 1.0
    return dataclasses.replace(convention, time_scale=convention.time_scale * factor)


def check_not_distilled(path: Path, name: str, own: dict, scheduler) -> None:
    """Raise ``ValueError`` for a network that its files show to be made for a few steps.

    The signs are those of the published SD-Turbo, SDXL-Turbo, LCM and FLUX.1-schnell. None of the keys that the messages
    tell to change means anything to a teacher.
    """
    kind, config = type(scheduler).__name__, scheduler.config
    if own.get("time_cond_proj_dim"):
        raise ValueError(f"{path}: its network takes a guidance scale like an LCM's: it is distilled already")
    file = path / "scheduler" / "scheduler_config.json"
    if name == "UNet2DConditionModel" and kind in TURBO and config.timestep_spacing == "trailing":
        raise ValueError(
            f"{path} is sampled like SD-Turbo ({kind}, trailing timesteps), which is distilled already; if it is not, set "
            f"timestep_spacing to 'leading' in {file}"
        )
    plain = config.get("shift") == 1.0 and not config.get("use_dynamic_shifting")
    if name == "FluxTransformer2DModel" and not own["guidance_embeds"] and plain:
        raise ValueError(
            f"{path} has no guidance input and no shift, like FLUX.1-schnell, which is distilled already; if it is not, set "
            f"use_dynamic_shifting to true in {file}"
        )


def check_one_network(path: Path, index: dict) -> None:
    """Raise ``ValueError`` for a pipeline that changes networks on the way, or conditions on more than a text."""
    if (index.get("transformer_2") or [None])[0]:
        raise ValueError(f"{path} has two transformers, one for each half of the noise levels; a teacher is one network")
    if index.get("requires_aesthetics_score"):
        raise ValueError(f"{path} is a refiner, whose network is told an aesthetic score; it is not supported")


def class_name(index: dict, component: str, path: Path) -> str:
    """The class of a pipeline's component.

    Raises:
        ValueError: none is named, or one that is not of diffusers.
    """
    match index.get(component):
        case ["diffusers", str(name)]:
            return name
    raise ValueError(f"{path / INDEX}: {component} is {index.get(component)!r:.100} and must be a class of diffusers")


def load_scheduler(path: Path, name: str):
    """A pipeline's scheduler; its class, not its file, knows the defaults.

    Raises:
        ValueError: one of another kind, or of a pipeline that is distilled already.
    """
    import diffusers  # slow, and only needed here

    if name in DISTILLED:
        raise ValueError(f"{path} is sampled by {name}: it is distilled already and has no PF-ODE to learn from")
    if not hasattr(diffusers, name):
        raise ValueError(f"{path}: diffusers {diffusers.__version__} has no {name}")
    file = component_folder(path, "scheduler") / "scheduler_config.json"
    steps = read_json(file).get("num_train_timesteps", 1000) if file.is_file() else 1000
    if not isinstance(steps, int) or steps > MAX_TRAIN_TIMESTEPS:  # tables of that length are made
        raise ValueError(f"{file}: num_train_timesteps must be an integer up to {MAX_TRAIN_TIMESTEPS:,}, got {steps!r:.100}")
    return read_component(getattr(diffusers, name), path, "scheduler")


def load_network(path: Path, component: str, name: str):
    """A pipeline's network.

    Raises:
        ValueError: a config that asks for far more than the weights that are there, or weights that do not fit it.
    """
    import diffusers

    folder, cls = component_folder(path, component), getattr(diffusers, name)
    options = {"use_safetensors": has_safetensors(folder), "output_loading_info": True}
    size = sum(file.stat().st_size for file in folder.iterdir())  # of files; a value takes a byte at least
    if "Transformer" in name:
        check_positions(folder, size)
    with Unfilled(size):
        model, found = read_component(cls, path, component, **options)
    for kind in ("missing", "unexpected"):
        if names := sorted(found[f"{kind}_keys"]):
            raise ValueError(f"{folder}: its weights do not fit its config: {len(names)} {kind} ({', '.join(names[:3])})")
    return model


def check_positions(folder: Path, size: int) -> None:
    """Raise ``ValueError`` for a table of positions, which diffusers computes by numpy, far larger than the weights."""
    file = folder / "config.json"
    own = {key: value for key, value in read_json(file).items() if isinstance(value, int)} if file.is_file() else {}
    grid = max(own.get("sample_size", 0), own.get("pos_embed_max_size", 0)) // max(own.get("patch_size", 1), 1)
    width = own.get("num_attention_heads", 16) * own.get("attention_head_dim", 64)
    if grid**2 * width > 2 * size + TABLES:
        raise ValueError(f"{file}: it asks for {grid}x{grid} positions, far more than its weights are made for")


def has_safetensors(folder: Path) -> bool:
    """Whether a model's weights are safetensors; else diffusers is to read a ``.bin`` (by ``torch.load``, weights only)."""
    return any(folder.glob("*.safetensors"))


def read_component(cls, path: Path, component: str, **options):
    try:
        return cls.from_pretrained(component_folder(path, component), local_files_only=True, **options)
    except Exception as error:  # diffusers and safetensors raise many kinds for missing and damaged files
        raise ValueError(f"{path}: its {component} cannot be read: {' '.join(str(error).split())[:200]}") from None


def scheduler_convention(scheduler) -> tuple[Parameterization, float | None]:
    """What a network means by its pipeline's scheduler, and its ``sigma_data`` if the scheduler has one.

    Raises:
        ValueError: a scheduler, prediction or noise schedule that is not supported.
    """
    name, config = type(scheduler).__name__, scheduler.config
    prediction = str(config.get("prediction_type", "epsilon"))
    if config.get("invert_sigmas"):
        raise ValueError(f"scheduler {name} with invert_sigmas is not supported")
    if name in FLOW or prediction == "flow_prediction" or config.get("use_flow_sigmas"):
        return Parameterization("flow", "velocity", "s", time_scale=config.num_train_timesteps), None
    if config.get("timestep_type") == "continuous":
        raise ValueError(f"scheduler {name} with timestep_type 'continuous' is not supported")
    if name in EDM_SCHEDULERS and prediction == "epsilon":
        return EDM, config.sigma_data
    if not hasattr(scheduler, "alphas_cumprod") or prediction not in VP_PREDICTIONS:
        raise ValueError(f"scheduler {name} with prediction_type {prediction!r:.100} is not supported")
    if config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr"):
        raise ValueError(f"scheduler {name}: trained_betas and rescale_betas_zero_snr are not supported")
    if str(config.beta_schedule) not in BETA_SCHEDULES:
        raise ValueError(f"beta_schedule {config.beta_schedule!r:.100} is not supported; {', '.join(BETA_SCHEDULES)} are")
    if config.num_train_timesteps < 3:
        raise ValueError(f"scheduler {name}: num_train_timesteps must be at least 3, got {config.num_train_timesteps}")
    schedule = {key: config[key] for key in ("beta_start", "beta_end", "num_train_timesteps")}
    time = BETA_SCHEDULES[config.beta_schedule]
    return Parameterization("vp", VP_PREDICTIONS[prediction], time, schedule=schedule), None
