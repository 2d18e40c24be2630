"""``distill compare``: quality and diversity of any models side by side, as one report.

Every model draws from the same noise and for the same labels. What it costs hours to compute, the points, is kept as soon as
it is there (:mod:`distill.comparison.store`); the report is made from that in seconds.
"""

import time
from pathlib import Path

from tqdm import tqdm

from distill.cli import check_folder
from distill.comparison.config import REAL, ComparisonConfig, ReferenceConfig, load_comparison, to_dict
from distill.comparison.entries import ImagesEntry, ModelEntry, Point, read_images, read_models
from distill.comparison.rows import Row
from distill.comparison.scores import Scorer
from distill.comparison.store import Store, as_samples, setting
from distill.cpu import tune_cpu
from distill.data import load_images
from distill.evaluation import build_reference, held_out_images, real_splits
from distill.evaluation.features import default_features, load_features
from distill.recipe import MINIMUM_SAMPLES, DataConfig

__all__ = ["compare"]


def compare(config: str | Path | dict, **overrides) -> dict:
    """Draw and score whatever is not there yet, and write ``report.html``, ``report.json`` and PNGs into ``output_dir``.

    Args:
        config: a YAML file, the name of one that ships with the package (``compare/report.yaml``), or its values.
        overrides: values by key; dots are written as ``__``.

    Returns:
        What is in ``report.json``.

    Raises:
        FileNotFoundError, ValueError: a bad config, models that cannot be compared or cannot have what is asked of them, or
            too few samples; one sentence each, before anything is drawn.
    """
    arguments = ["{...}" if isinstance(config, dict) else repr(str(config))]
    command = f"distill.compare({', '.join(arguments + [f'{key}={value!r}' for key, value in overrides.items()])})"
    return run(config, {key.replace("__", "."): value for key, value in overrides.items()}, command)


def run(config: str | Path | dict, overrides: dict, command: str) -> dict:
    """:func:`compare` with overrides by dotted key; ``command`` is what the report says it was made by."""
    start = time.time()
    tune_cpu()  # sampling times are among the results
    parsed = load_comparison(config, overrides)
    check_folder(Path(parsed.output_dir), f"output_dir {parsed.output_dir}")
    entries = prepare(parsed)
    rows, real = compute(parsed, entries)
    from distill.comparison.report import write_report  # matplotlib is slow to import

    facts = {"command": command, "config": to_dict(parsed), "setting": setting(), "seconds": time.time() - start}
    return write_report(parsed, entries, rows, real, facts)


def prepare(config: ComparisonConfig) -> list[ModelEntry | ImagesEntry]:
    """The models and images of a comparison, checked against each other."""
    of_models = [m for m in config.models if m.source is not None]
    found = {m.name: read_models(m, config.guidance_scales, config.mixed_precision) for m in of_models}
    models = [entry for entries in found.values() for entry in entries]
    check_alike(models)
    shape = models[0].sample_shape if models else image_shape(config)
    found |= {m.name: [read_images(m, shape, config.num_samples)] for m in config.models if m.images is not None}
    return [entry for m in config.models for entry in found[m.name]]


def check_alike(models: list[ModelEntry]) -> None:
    """Raise ``ValueError`` unless all draw images of one shape and know the same classes."""
    for other in models[1:]:
        first = models[0]
        if other.sample_shape != first.sample_shape:
            raise ValueError(
                f"models of one comparison draw images of one shape: {first.name!r} has {list(first.sample_shape)}, "
                f"{other.name!r} {list(other.sample_shape)}"
            )
        if other.num_classes != first.num_classes:
            known = [f"{m.name!r} has {m.num_classes or 'none'}" for m in (first, other)]
            raise ValueError(f"models of one comparison have the same classes: {known[0]}, {known[1]}")


def image_shape(config: ComparisonConfig) -> tuple[int, ...]:
    """That of the real images, where there is no model to say which."""
    images = load_images(DataConfig(config.data.source, "train", config.data.image_column, None), 3)
    image = images.rows[0][config.data.image_column]
    return (1 if len(image.getbands()) == 1 else 3, image.height, image.width)


def compute(config: ComparisonConfig, entries: list[ModelEntry | ImagesEntry]) -> tuple[list[Row], Row | None]:
    """A row for every model, number of steps and guidance scale, and that of the held-out images."""
    data, shape = config.data, entries[0].sample_shape
    extractor = load_features(config.features or default_features(data.source))
    check_features_fit(extractor, shape)
    reference = build_reference(data.source, extractor.name, shape[0], data.image_column, data.label_column)
    features = f"{extractor.name} {extractor.version}"
    store = Store(Path(config.output_dir), extractor, config.batch_size)
    real_entry = held_out(config, shape, reference.digest)
    points = [p for entry in entries for p in entry.points(config.num_samples, config.seeds, features)]
    real_points = [] if real_entry is None else real_entry.points(config.num_samples, config.seeds, features)
    num_classes = next((entry.num_classes for entry in entries if entry.num_classes), None)
    check_classes_fit(num_classes, real_entry, data)
    store.folder.mkdir(parents=True, exist_ok=True)
    against = {"reference": reference.digest, "held_out": sum(p.num for p in real_points), "classes": num_classes}
    todo = sum(store.cost(p, against) for p in real_points + points)
    with tqdm(total=todo, desc="points", bar_format=BAR, disable=not todo) as bar:
        real = as_samples(store.samples(real_points[0], bar)) if real_points else None
        scorer = Scorer(reference, real, num_classes)
        results = {}
        for i, point in enumerate(real_points + points):
            bar.set_description(f"{i + 1}/{len(real_points + points)}: {point.title}")
            results[point] = store.result(point, scorer, against, bar)
            if i + 1 - len(real_points) == len(points) or points[i + 1 - len(real_points)].entry is not point.entry:
                point.entry.release()
    rows = group(points, results, store)
    return rows, group(real_points, results, store)[0] if real_points else None


BAR = "{desc} |{bar:20}| {percentage:3.0f} % [{elapsed}, {remaining} left]"


def check_features_fit(extractor, shape: tuple[int, ...]) -> None:
    if extractor.sample_shape not in (None, tuple(shape)):
        want = list(extractor.sample_shape)
        raise ValueError(f"features {extractor.name} take images of shape {want}, got {list(shape)}; choose others: pixels")


def check_classes_fit(num_classes: int | None, real: ImagesEntry | None, data: ReferenceConfig) -> None:
    """Raise ``ValueError`` for real images of more classes than the models know."""
    if num_classes is None or real is None or real.own_labels is None:
        return
    highest = int(real.own_labels.max())
    if highest >= num_classes:
        raise ValueError(
            f"the models know {num_classes} classes, {data.source!r} has labels up to {highest}; name the column of theirs "
            "(data.label_column), or null"
        )


def held_out(config: ComparisonConfig, shape: tuple[int, ...], digest: str) -> ImagesEntry | None:
    """The real images that no training saw; ``None`` if they are too few."""
    splits = real_splits(config.data.source, shape[0], config.data.image_column, config.data.label_column)
    pixels, labels = held_out_images(splits)
    if len(pixels) < MINIMUM_SAMPLES:
        return None
    if tuple(pixels.shape[1:]) != tuple(shape):
        raise ValueError(
            f"images of {config.data.source!r} have shape {list(pixels.shape[1:])}, those to compare {list(shape)}"
        )
    return ImagesEntry(REAL, "real", pixels, labels, {"reference": digest}, f"{config.data.source}, held out")


def group(points: list[Point], results: dict[Point, dict], store: Store) -> list[Row]:
    """Points that differ in nothing but the seed are one row."""
    found: dict[tuple, list[Point]] = {}
    for point in points:
        found.setdefault((point.entry.name, point.steps, point.guidance), []).append(point)
    return [Row(same, [results[p] for p in same], store.samples_path(same[0])) for same in found.values()]
