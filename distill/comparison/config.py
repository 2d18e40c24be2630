"""What ``distill compare`` compares, as checked, typed values: YAML in, dataclasses out, as a recipe."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

from distill.device import PRECISIONS
from distill.recipe import MINIMUM_SAMPLES, expand_data, parse_dataclass, read_yaml, recipe_path, set_dotted
from distill.sampling import SOLVERS

REAL = "real images"


@dataclass
class ModelConfig:
    """One model, or a folder of images in place of one."""

    name: str  # in the report
    source: str | list[str] | None = None  # whatever distill.from_pretrained takes; a list: students, each of its own scale
    steps: list[int] | None = None  # null: 18 Heun steps of a teacher, 1, 2 and 4 of a student
    guidance_scales: list[float] | None = None  # null: those of the comparison, or the ones that the students have
    solver: str | None = None  # of a teacher: heun (2n - 1 evaluations, the default) or dpmpp_2m (n)
    images: str | None = None  # in place of source: an image folder, or another data source
    split: str = "train"  # of images
    image_column: str = "image"
    label_column: str | None = None  # null: images without labels

    @property
    def sources(self) -> list[str]:
        if self.source is None:
            return []
        return self.source if isinstance(self.source, list) else [self.source]


@dataclass
class ReferenceConfig:
    """The real images that all are scored against."""

    source: str
    image_column: str = "image"
    label_column: str | None = "label"


@dataclass
class ComparisonConfig:
    """One comparison. ``docs/compare.md`` explains every key."""

    output_dir: str
    models: list[ModelConfig]
    data: ReferenceConfig  # a string is short for its source
    title: str = "Quality and diversity, side by side"
    features: str | None = None  # null: MNIST-CNN for data: mnist, else pixels
    guidance_scales: list[float] = field(default_factory=lambda: [1.0])
    num_samples: int = 10_000
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    batch_size: int = 250
    mixed_precision: str = "no"  # or bf16, in which the networks are then evaluated
    notes: str | None = None  # printed in the report


def load_comparison(source: str | Path | dict, overrides: dict | None = None) -> ComparisonConfig:
    """Read and check a comparison.

    Args:
        source: a YAML file, the name of one that ships with the package (``compare/report.yaml``), or its values.
        overrides: values by dotted key.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown key, a wrong type, or a value that is not allowed; one sentence each.
    """
    path = None if isinstance(source, dict) else recipe_path(source, "comparison")
    values = dict(source) if path is None else read_yaml(path)
    for key, value in (overrides or {}).items():
        set_dotted(values, key, {"source": value} if key == "data" and isinstance(value, str) else value)
    expand_data(values)
    where = "comparison" if path is None else str(path)
    config = parse_dataclass(ComparisonConfig, values, where, "")
    check(config, where)
    return config


def check(config: ComparisonConfig, where: str) -> None:
    """Rules that need no model."""
    if not config.output_dir.strip():
        raise ValueError(f"{where}: output_dir must name a folder, got {config.output_dir!r}")
    if config.num_samples < MINIMUM_SAMPLES:
        raise ValueError(f"{where}: num_samples must be at least {MINIMUM_SAMPLES}, got {config.num_samples}")
    if config.batch_size < 1:
        raise ValueError(f"{where}: batch_size must be at least 1, got {config.batch_size}")
    if config.mixed_precision not in PRECISIONS:
        raise ValueError(f"{where}: mixed_precision is {config.mixed_precision!r}; allowed: {', '.join(PRECISIONS)}")
    check_list(config.seeds, f"{where}: seeds", lambda seed: 0 <= seed < 2**63, "from 0 to 2^63 - 1")
    check_scales(config.guidance_scales, f"{where}: guidance_scales")
    if not config.models:
        raise ValueError(f"{where}: models must hold at least one model")
    names = [model.name for model in config.models]
    check_list(names, f"{where}: names of models", lambda name: name.strip() != "", "not empty")
    if REAL in names:
        raise ValueError(f"{where}: no model can be named {REAL!r}: the held-out images of the data are")
    for i, model in enumerate(config.models):
        check_model(model, f"{where}: models[{i}]")


def check_model(model: ModelConfig, where: str) -> None:
    if (model.source is None) == (model.images is None):
        raise ValueError(f"{where} needs exactly one of source, a model, and images, a folder")
    if model.images is not None:
        for key in ("steps", "guidance_scales", "solver"):
            if getattr(model, key) is not None:
                raise ValueError(f"{where}.{key} belongs to a model; images are as they are")
    if isinstance(model.source, list):
        check_list(model.source, f"{where}.source", lambda source: source.strip() != "", "not empty")
    if model.solver not in (None, *SOLVERS):
        raise ValueError(f"{where}.solver is {model.solver!r}; allowed: {', '.join(SOLVERS)}")
    if model.steps is not None:
        check_list(model.steps, f"{where}.steps", lambda n: n >= 1, "at least 1")
    if model.guidance_scales is not None:
        check_scales(model.guidance_scales, f"{where}.guidance_scales")


def check_scales(scales: list[float], where: str) -> None:
    check_list(scales, where, lambda w: math.isfinite(w) and w >= 0, "finite numbers of 0 or more")


def check_list(values: list, where: str, allowed, wanted: str) -> None:
    """Raise ``ValueError`` for an empty list, a value that is not allowed, or one that is there twice."""
    if not values:
        raise ValueError(f"{where} must hold at least one value")
    for value in values:
        if not allowed(value):
            raise ValueError(f"{where} must be {wanted}, got {value!r}")
        if values.count(value) > 1:
            raise ValueError(f"{where} must differ, got {value!r} twice")


def to_dict(config: ComparisonConfig) -> dict:
    """Plain values, as in the report."""
    return dataclasses.asdict(config)
