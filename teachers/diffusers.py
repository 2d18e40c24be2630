"""Teachers from diffusers pipeline folders, read from what their scheduler and model configs say.

A pipeline's scheduler tells what the network predicts and what its time means; only its sampling grid, which shifts and
spacings belong to, is not needed: a student has its own. Every component is a class of diffusers itself; no code in the
folder is run.
"""

import json
from pathlib import Path

from torch import Tensor

from teachers.parameterization import EDM, Parameterization

INDEX = "model_index.json"
COMPONENTS = ("unet", "transformer")  # where pipelines keep the network
SCHEDULER = "scheduler_config.json"
# What a pipeline says of itself, in small files. Old ones have all their parts in one folder.
DESCRIPTIONS = (
    INDEX, "config.json", SCHEDULER, f"scheduler/{SCHEDULER}", *(f"{component}/config.json" for component in COMPONENTS)
)  # fmt: skip
# Class in diffusers -> our network around it.
NETWORKS = {"UNet2DModel": "DiffusersUNet2D", "DiTTransformer2DModel": "DiffusersDiT"}
DISTILLED = {"LCMScheduler", "TCDScheduler", "SCMScheduler", "CMStochasticIterativeScheduler", "FlowMatchLCMScheduler"}
FLOW = {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"}
EDM_SCHEDULERS = {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"}
VP_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
BETA_SCHEDULES = {"linear": "ddpm_linear", "scaled_linear": "ddpm_scaled_linear", "squaredcos_cap_v2": "ddpm_cosine"}
PIXEL_SIGMA_DATA, LATENT_SIGMA_DATA = 0.5, 1.0  # unless a recipe or the scheduler says otherwise


def is_diffusers_folder(path: Path) -> bool:
    """Whether this is a saved pipeline made of diffusers' own classes (an exported student is not)."""
    index = path / INDEX
    return index.is_file() and isinstance(read_json(index).get("_class_name"), str)


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # malformed JSON or UTF-8
        raise ValueError(f"{path} is not valid JSON: {error}") from None
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
    convention, sigma_data = scheduler_convention(load_scheduler(path, class_name(index, "scheduler", path)))
    model = load_network(path, component, name)
    own = {key: value for key, value in model.config.items() if not key.startswith("_")}
    if own.get("time_embedding_type", "positional") != "positional":
        kind = own["time_embedding_type"]
        raise ValueError(f"{path}: its {component} has a {kind} time embedding; positional ones are supported")
    latents = any(index.get(name) not in (None, [None, None]) for name in ("vae", "vqvae"))  # [null, null]: left out
    size = own["sample_size"]
    channels = own["in_channels"]
    config = {
        "role": "teacher",
        "network": NETWORKS[name],
        "network_config": {"config": json.loads(json.dumps(own))},
        "parameterization": convention.to_dict(),
        "sigma_data": sigma_data or (LATENT_SIGMA_DATA if latents else PIXEL_SIGMA_DATA),
        "sample_shape": [channels, *(size if isinstance(size, list | tuple) else (size, size))],
        "num_classes": own.get("num_class_embeds") if name == "UNet2DModel" else own["num_embeds_ada_norm"],
        "label_format": "index",
        **({"latents": True} if latents and channels in (1, 3) else {}),
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


def class_name(index: dict, component: str, path: Path) -> str:
    """The class of a pipeline's component.

    Raises:
        ValueError: none is named, or one that is not of diffusers.
    """
    match index.get(component):
        case ["diffusers", str(name)]:
            return name
    raise ValueError(f"{path / INDEX}: {component} is {index.get(component)!r} and must be a class of diffusers")


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
    return read_component(getattr(diffusers, name), path, "scheduler")


def load_network(path: Path, component: str, name: str):
    import diffusers

    safe = has_safetensors(component_folder(path, component))
    return read_component(getattr(diffusers, name), path, component, use_safetensors=safe)


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
    prediction = config.get("prediction_type", "epsilon")
    if name in FLOW or prediction == "flow_prediction" or config.get("use_flow_sigmas"):
        return Parameterization("flow", "velocity", "s", time_scale=config.num_train_timesteps), None
    if config.get("timestep_type") == "continuous":
        raise ValueError(f"scheduler {name} with timestep_type 'continuous' is not supported")
    if name in EDM_SCHEDULERS and prediction == "epsilon":
        return EDM, config.sigma_data
    if not hasattr(scheduler, "alphas_cumprod") or prediction not in VP_PREDICTIONS:
        raise ValueError(f"scheduler {name} with prediction_type {prediction!r} is not supported")
    if config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr"):
        raise ValueError(f"scheduler {name}: trained_betas and rescale_betas_zero_snr are not supported")
    if config.beta_schedule not in BETA_SCHEDULES:
        raise ValueError(f"beta_schedule {config.beta_schedule!r} is not supported; {', '.join(BETA_SCHEDULES)} are")
    if config.num_train_timesteps < 3:
        raise ValueError(f"scheduler {name}: num_train_timesteps must be at least 3, got {config.num_train_timesteps}")
    schedule = {key: config[key] for key in ("beta_start", "beta_end", "num_train_timesteps")}
    time = BETA_SCHEDULES[config.beta_schedule]
    return Parameterization("vp", VP_PREDICTIONS[prediction], time, schedule=schedule), None
