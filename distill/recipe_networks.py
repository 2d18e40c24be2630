"""The networks that a recipe names, checked against it: what is pretrained, its guidance, and the student to be trained."""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from distill.data import collate
from distill.lora import add_adapters, sharing_student
from distill.model import has_no_velocity, load_guidance_teacher
from distill.prompts import null_prompt
from distill.recipe import Recipe
from distill.sampling import device_of
from teachers import PRESETS, Parameterization, Teacher, load, load_config, probe
from teachers.condition import Condition, fits
from teachers.networks import build, is_registered
from teachers.pretrained import TOLERABLE_SPEED, time_embedding_speed
from teachers.probe import num_probed
from teachers.retrofit import retrofit


def load_pretrained(recipe: Recipe, given: Teacher | None = None) -> Teacher | None:
    """The network that the recipe starts from, or the one ``given`` in its place; ``None`` for one trained from scratch.

    Raises:
        FileNotFoundError: it is not there; with the recipe's notes, which may say where to get it.
        ValueError: its samples are not those of the recipe.
    """
    if recipe.network is not None:
        return None
    if given is None:
        return load_fitting(recipe.teacher, recipe, for_velocity=recipe.needs_velocity)
    given = fitted(given, recipe)
    check_fits(given, recipe.teacher, recipe)
    return with_null_prompt(given, recipe.teacher, recipe)


def load_velocity_teacher(recipe: Recipe, pretrained: Teacher | None) -> Teacher | None:
    """The frozen network that objectives ``diffusion`` and ``retrofit`` (the ``pretrained`` one) take their targets from;
    ``None`` if they come from the data.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_pretrained`; or it has no null class where labels are dropped.
    """
    if recipe.objective == "retrofit":
        return pretrained
    if recipe.velocity_teacher is None:
        return None
    teacher = load_fitting(recipe.velocity_teacher, recipe, for_velocity=True)
    if recipe.label_dropout and teacher.num_classes is not None:
        teacher.require_null_class()
    return teacher


def load_fitting(source: str, recipe: Recipe, for_velocity: bool) -> Teacher:
    """Load a pretrained network and check that its samples are those of the recipe and, ``for_velocity``, its role."""
    try:
        teacher = fitted(load(source), recipe)
    except FileNotFoundError as error:
        notes = f" ({recipe.notes})" if recipe.notes else ""
        raise FileNotFoundError(f"the recipe needs {source}{notes}: {error}") from None
    if for_velocity and load_config(source)["role"] == "student":
        raise ValueError(has_no_velocity(source))
    check_fits(teacher, source, recipe)
    return with_null_prompt(teacher, source, recipe)


def fitted(teacher: Teacher, recipe: Recipe) -> Teacher:
    """The same network for samples of the recipe's size and ``sigma_data``, where it is free of its own."""
    return teacher.at_sigma_data(recipe.sigma_data).at_sample_shape(recipe.sample_shape)


def check_fits(teacher: Teacher, source: str, recipe: Recipe) -> None:
    """Raise ``ValueError`` unless the network's samples, classes and ``sigma_data`` are the recipe's."""
    for key in ("sample_shape", "num_classes", "sigma_data"):
        own, asked = getattr(teacher, key), getattr(recipe, key)
        own = list(own) if isinstance(own, tuple) else own
        if own != asked:
            raise ValueError(f"the network {source!r} has {key} {own}, the recipe says {asked}")


def with_null_prompt(network: Teacher, source: str, recipe: Recipe) -> Teacher:
    """A network of texts with the null prompt of the recipe's prompts; any other one as it is.

    Raises:
        FileNotFoundError: no such prompts.
        ValueError: a network of texts without prompts, prompts for one that takes no text, or of other shapes.
    """
    folder, wanted = recipe.data.prompts, network.text_condition
    if wanted is None and folder is not None:
        raise ValueError(f"the network {source!r} takes no text embeddings; remove data.prompts ({folder!r})")
    if wanted is None:
        return network
    if folder is None:
        raise ValueError(
            f"the network {source!r} is conditioned on text: name a folder of distill precompute prompts as data.prompts"
        )
    null = null_prompt(folder)
    if not fits(null.shapes(), wanted):
        raise ValueError(
            f"data.prompts {folder!r} holds text embeddings of shapes {null.shapes()}, the network {source!r} takes {wanted}"
        )
    return network.twin(null_prompt=null)


def build_teacher(recipe: Recipe, pretrained: Teacher | None) -> Teacher | None:
    """The recipe's pretrained network with the recipe's guidance; ``None`` for objective ``diffusion``. One in memory that
    brings its own guidance teacher keeps it if the recipe names none.

    Raises:
        FileNotFoundError: the guidance teacher is not there.
        ValueError: guidance of an unconditional network by itself, or by one that does not fit.
    """
    if recipe.is_diffusion:
        return None
    scale, interval = recipe.guidance_scale, recipe.guidance_interval
    guide = pretrained.guidance_teacher
    if recipe.guidance_teacher is not None:
        guide = fitted(load_guidance_teacher(recipe.guidance_teacher), recipe)
    if scale != 1.0 and not pretrained.is_conditional and guide is None:
        raise ValueError(
            f"teacher {recipe.teacher!r} is unconditional and can be guided by a guidance_teacher only; name one or remove "
            "guidance_scale"
        )
    if scale != 1.0 and guide is None:
        pretrained.require_null_class()
    # Over a range the objective passes its own scales; validation looks at the lowest.
    low = scale[0] if isinstance(scale, list) else scale
    return pretrained.guided_by(low, None if interval is None else tuple(interval), guide)


def build_student(recipe: Recipe, pretrained: Teacher | None) -> Teacher:
    """The network to train: a copy of the pretrained one, changed or of another that the recipe names; or a new one.

    Raises:
        ValueError: a network that cannot be built, that does not fit the recipe's samples, or lacks what it needs.
    """
    if pretrained is None:
        student = new_network(recipe)
    elif recipe.objective == "retrofit":
        student = retrofit(pretrained, recipe.qk_norm)
    else:
        start = pretrained if recipe.student is None else load_fitting(recipe.student, recipe, for_velocity=False)
        ranged = isinstance(recipe.guidance_scale, list)
        student = start.student(ranged) if recipe.lora is None else sharing_student(start, ranged)
    if recipe.is_diffusion and recipe.label_dropout and student.num_classes is not None:
        student.require_null_class()
    set_dropout(student.native, recipe.dropout)
    if recipe.lora is not None:  # after the dropout of the layers that they are added to, which is another one
        add_adapters(student.native, recipe.lora, recipe.seed)
    return student


def new_network(recipe: Recipe) -> Teacher:
    """A network with random weights, tried out once."""
    n = recipe.network
    named = isinstance(n.parameterization, str)
    if named and n.parameterization not in PRESETS:
        raise ValueError(f"network.parameterization is {n.parameterization!r}; allowed: {', '.join(PRESETS)}")
    try:
        convention = PRESETS[n.parameterization] if named else Parameterization(**n.parameterization)
    except TypeError as error:
        raise ValueError(f"network.parameterization: {error}") from None
    network = Teacher(
        build(n.name, n.config), convention, recipe.sigma_data, tuple(recipe.sample_shape), recipe.num_classes,
        n.label_format,
    )  # fmt: skip
    network = with_null_prompt(network, n.name, recipe)
    last = None if recipe.num_classes is None else torch.tensor([recipe.num_classes - (recipe.label_dropout == 0)])
    try:
        with torch.no_grad():
            network(torch.zeros(1, *recipe.sample_shape), torch.ones(1), last)
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"network {n.name} does not fit the recipe's sample_shape and num_classes: {reason}") from error
    return network


def set_dropout(network: nn.Module, p: float) -> None:
    """Set the probability of every ``nn.Dropout``, and of every module that has a float ``dropout``.

    Raises:
        ValueError: dropout for a network that has none.
    """
    found = False
    for module in network.modules():
        name = "p" if isinstance(module, nn.Dropout) else "dropout"
        # Not getattr: models of diffusers hand out their config as attributes too, and warn.
        if isinstance(vars(module).get(name), float):
            setattr(module, name, p)
            found = True
    if p and not found:
        raise ValueError(f"dropout is {p}, but {type(network).__name__} has none; set it to 0")


def teacher_verdicts(
    recipe: Recipe, teacher: Teacher | None, velocity_teacher: Teacher | None, data: Dataset | None
) -> list[str]:
    """What :func:`teachers.probe` says of each network whose velocity is learned from, by a few images of ``data`` or by its
    own samples.

    Raises:
        ValueError: one denoises under another parameterization than its own.
    """
    networks = {"teacher" if recipe.needs_velocity else "velocity teacher": velocity_teacher}
    if recipe.needs_velocity and teacher is not None:
        networks = {"teacher": teacher, "guidance teacher": teacher.guidance_teacher}
    verdicts, num = [], num_probed(recipe.sample_shape)
    for name, network in networks.items():
        if network is None:
            continue
        images, labels = (None, None) if data is None else few_images(data, num, recipe, device_of(network))
        verdicts.append(f"{name}: {probe(network, images, labels if network.is_conditional else None)['verdict']}")
    return verdicts


def time_warnings(student: Teacher) -> list[str]:
    """One warning if the student embeds the time more steeply than a derivative along the PF-ODE is good with."""
    speed = time_embedding_speed(student)
    if speed is None or speed <= TOLERABLE_SPEED:
        return []
    return [
        f"warning: the student's time embedding turns at a speed of {speed:.2g}, above {TOLERABLE_SPEED:g}: it may end "
        "worse or diverge; run objective retrofit first and name its result as student"
    ]


def few_images(data: Dataset, n: int, recipe: Recipe, device: torch.device) -> tuple[Tensor, Condition | None]:
    """``n`` training images, always the same, and their labels or prompts."""
    indices = torch.randperm(len(data), generator=torch.Generator().manual_seed(recipe.seed))[:n].tolist()
    items = [data[i] for i in indices]
    if not recipe.is_conditional:
        return torch.stack([x0 for x0, _ in items]).to(device), None
    x0, labels = collate(items)
    return x0.to(device), labels.to(device)


def license_of(model: Teacher | None) -> str | None:
    """The licence of a pretrained model's weights, which holds for what is derived from them; ``None`` if unknown."""
    known = model is not None and model.source and is_registered(model.native)
    return load_config(model.source).get("training", {}).get("license", "unknown") if known else None
