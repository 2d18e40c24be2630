"""A recipe's networks by their configs or names alone, without weights."""

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from distill.lora import add_adapters, sharing_student
from distill.recipe import Recipe
from distill.recipe_networks import check_fits, fitted, set_dropout
from teachers import EDM, Teacher
from teachers.condition import example_text
from teachers.networks import build
from teachers.pretrained import outline, outline_of
from teachers.released import released_config


@dataclass
class Networks:
    """What a recipe trains, and what it learns from, without weights."""

    student: Teacher
    teacher: Teacher | None = None  # gives the velocity, with the recipe's guidance
    assumed: list[str] = field(default_factory=list)  # sentences about networks that are not here

    def trained(self) -> int:
        return sum(p.numel() for p in self.student.parameters() if p.requires_grad)

    def frozen(self) -> int:
        """Parameters that are not trained; those that student and teacher share count once."""
        fixed = [p for p in self.student.parameters() if not p.requires_grad]
        fixed += [] if self.teacher is None else list(self.teacher.parameters())
        return sum({id(p): p.numel() for p in fixed}.values())


def hollow(network: Teacher, device: str) -> Teacher:
    """The same network around empty tensors: on the device ``meta``, or ``cpu`` inside ``FakeTensorMode``."""
    conditions = [n.null_prompt.tensors for n in (network, network.guidance_teacher) if n is not None and n.null_prompt]
    held = [tensor for tensors in conditions for tensor in tensors.values()]
    for module in network.modules():
        held += [value for value in vars(module).values() if isinstance(value, Tensor)]
    memo = {id(x): torch.empty(x.shape, dtype=x.dtype, device=device) for x in (*held, *network.buffers())}
    for p in network.parameters():
        memo[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=device), p.requires_grad)
    return copy.deepcopy(network, memo)


def planned_networks(recipe: Recipe, pretrained: Teacher | None = None) -> Networks:
    """The recipe's networks from their configs alone. One that is not here is taken from its name, if it is that of a
    released EDM or EDM2 checkpoint.

    Args:
        pretrained: in place of the recipe's ``teacher``, for a model in memory.

    Raises:
        FileNotFoundError: a teacher that is neither here nor known by its name.
        ValueError: one that does not fit the recipe.
    """
    assumed: list[str] = []
    if recipe.network is not None:
        student, teacher = network_from_scratch(recipe), None
    else:
        found = outlined(recipe.teacher, recipe, assumed) if pretrained is None else hollow(pretrained, "meta")
        check_fits(found, recipe.teacher, recipe)
        student, teacher = planned_student(recipe, found, assumed), planned_teacher(recipe, found, assumed)
    if recipe.velocity_teacher is not None:
        teacher = outlined(recipe.velocity_teacher, recipe, assumed)
    set_dropout(student.native, recipe.dropout)
    return Networks(student, teacher, assumed)


def network_from_scratch(recipe: Recipe) -> Teacher:
    n = recipe.network
    with torch.device("meta"):
        native = build(n.name, n.config)
    # Every convention costs the same.
    return Teacher(native, EDM, recipe.sigma_data, tuple(recipe.sample_shape), recipe.num_classes, n.label_format)


def outlined(source: str, recipe: Recipe, assumed: list[str]) -> Teacher:
    """A pretrained network by its config or its name; a sentence about the latter is added to ``assumed``."""
    try:
        network = outline(source)
    except FileNotFoundError as error:
        config = released_config(source)
        if config is None:
            notes = f" ({recipe.notes})" if recipe.notes else ""
            raise FileNotFoundError(f"the recipe needs {source}{notes}: {error}") from None
        network = outline_of(config, source)
        size = sum(p.numel() for p in network.parameters())
        assumed.append(f"{source} is not here; by its name it is {config['network']} with {size:,} parameters")
    network = fitted(network, recipe)
    return network if network.text_condition is None else network.twin(null_prompt=example_text(network.text_condition, 1))


def planned_teacher(recipe: Recipe, pretrained: Teacher, assumed: list[str]) -> Teacher | None:
    """The frozen network with the recipe's guidance; none where the velocity comes from the data."""
    if recipe.objective == "retrofit":
        return pretrained
    if not recipe.needs_velocity:
        return None
    # Over a range of scales nearly every sample is guided.
    scale = recipe.guidance_scale[1] if isinstance(recipe.guidance_scale, list) else recipe.guidance_scale
    named = recipe.guidance_teacher
    guide = pretrained.guidance_teacher if named is None else outlined(named, recipe, assumed)
    return pretrained.guided_by(scale, None, guide)


def planned_student(recipe: Recipe, pretrained: Teacher, assumed: list[str]) -> Teacher:
    """The network to train. A retrofitted one is planned as its teacher, of which it differs by one small layer."""
    start = pretrained
    if recipe.student is not None:
        try:
            start = fitted(outline(recipe.student), recipe)
        except FileNotFoundError:
            assumed.append(f"{recipe.student} is not here; its network is taken to be the teacher's")
    ranged = isinstance(recipe.guidance_scale, list)
    with torch.device("meta"):
        if recipe.lora is None:
            return start.student(ranged)
        student = sharing_student(start, ranged)
        add_adapters(student.native, recipe.lora, recipe.seed)
    return student
