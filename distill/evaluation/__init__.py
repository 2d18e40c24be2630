"""Scores of generated images against real ones, each with the score of unseen real images beside it."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from huggingface_hub import cached_assets_path
from safetensors.torch import save_file
from torch import Tensor

from distill.data import Images, as_tensors, has_split, load_images
from distill.evaluation.features import FeatureExtractor, default_features, load_features
from distill.evaluation.metrics import (
    FeatureStatistics,
    density_coverage,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from distill.evaluation.table import format_table
from distill.latents import is_latents_folder
from distill.recipe import MINIMUM_SAMPLES, DataConfig, Recipe
from teachers.pretrained import read_safetensors, write_atomically

__all__ = [
    "Reference", "build_reference", "evaluate", "evaluation_data", "evaluation_source", "extract", "format_table",
    "recipe_reference",
]  # fmt: skip

# Rows for the metrics that compare all pairs; the Fréchet distance uses every image.
PAIRWISE_SAMPLES = 10_000
# Training images that the nearest one of a sample is looked for among.
TRAINING_SAMPLES = 100_000


@dataclass(frozen=True)
class Reference:
    """What samples are scored against: statistics of all training images, the features of many of them, and features of
    the held-out split, which scored the same way are the real-against-real floor.
    """

    extractor: FeatureExtractor
    statistics: FeatureStatistics
    training: Tensor  # (<= TRAINING_SAMPLES, D), in random order
    held_out: Tensor  # (N, D), in random order
    held_out_hits: Tensor | None  # (N,) whether the classifier sees the true class
    floors: dict[int, dict] = field(default_factory=dict)  # scores of real images by their number, once computed
    digest: str | None = None  # of the images and the features they are seen by

    @property
    def rows(self) -> Tensor:
        """Those that are compared pair by pair, ``(<= PAIRWISE_SAMPLES, D)``."""
        return self.training[:PAIRWISE_SAMPLES]

    def floor(self, num: int) -> dict:
        """Scores of ``num`` held-out real images (all of them if there are fewer; empty if they are too few)."""
        if len(self.held_out) < MINIMUM_SAMPLES:
            return {}
        if num not in self.floors:
            hits = None if self.held_out_hits is None else self.held_out_hits[:num]
            self.floors[num] = self.score(self.held_out[:num], hits)
        return self.floors[num]

    def frechet_distance(self, batches: Iterable[tuple[Tensor, Tensor | None]]) -> float:
        """The Fréchet distance of generated batches alone, for a search."""
        statistics = FeatureStatistics()
        for images, _ in batches:
            statistics.update(extract(self.extractor, images, None)[0])
        return frechet_distance(self.statistics, statistics)

    def score(self, features: Tensor, hits: Tensor | None) -> dict:
        """Every metric of ``features`` ``(N, D)``. The all-pairs metrics compare equally many on both sides."""
        name = self.extractor.name
        if len(features) < MINIMUM_SAMPLES:
            raise ValueError(f"metrics need at least {MINIMUM_SAMPLES} samples, got {len(features)}")
        pair = min(len(features), len(self.rows))
        real, fake = self.rows[:pair], features[:pair]
        precision, recall = precision_recall(real, fake, k=3)
        density, coverage = density_coverage(real, fake, k=5)
        scores = {
            "num_samples": len(features),
            f"{name}-FD": frechet_distance(self.statistics, FeatureStatistics().update(features)),
            f"{name}-KID": kernel_distance(real, fake),
            "precision (k=3)": precision,
            "recall (k=3)": recall,
            "density (k=5)": density,
            "coverage (k=5)": coverage,
        }
        if hits is not None:
            scores["asked class"] = hits.double().mean().item()
        return scores


@torch.no_grad()
def extract(extractor: FeatureExtractor, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Features ``(N, D)`` of images on their device and whether each is seen as its label.

    Raises:
        ValueError: images of a shape that the extractor does not take.
    """
    if extractor.sample_shape not in (None, tuple(images.shape[1:])):
        want, got = list(extractor.sample_shape), list(images.shape[1:])
        raise ValueError(f"features {extractor.name} take samples of shape {want}, got {got}; choose others, such as pixels")
    features, hits = [], []
    for start in range(0, len(images), 500):
        batch = images[start : start + 500].cpu()
        features.append(extractor.extract(batch))
        if extractor.classify is not None and labels is not None:
            hits.append(extractor.classify(batch) == labels[start : start + 500].cpu())
    return torch.cat(features), torch.cat(hits) if hits else None


@lru_cache(maxsize=4)
def build_reference(
    source: str = "mnist",
    features: str | FeatureExtractor | None = None,
    channels: int = 1,
    image_column: str = "image",
    label_column: str | None = "label",
) -> Reference:
    """The :class:`Reference` of a data source: its ``train`` and ``test`` splits, or without a ``test`` split the one it
    has, of which half (at most ``PAIRWISE_SAMPLES``) is held out.

    What was extracted is kept in Hugging Face's cache folder (``HF_HOME``) and read from there the next time.
    """
    extractor = load_features(default_features(source) if features is None else features)
    splits = real_splits(source, channels, image_column, label_column)
    digest = reference_digest(extractor, channels, splits)
    path = cache_path(extractor, digest)
    if path is None:
        tensors = extract_reference(extractor, *splits)
    elif path.exists():
        tensors = read_safetensors(path)
    else:
        tensors = extract_reference(extractor, *splits)
        write_atomically(path, lambda temporary: save_file(tensors, temporary))
    statistics = FeatureStatistics()
    statistics.count = int(tensors["count"])
    statistics.total, statistics.outer = tensors["total"], tensors["outer"]
    hits = tensors.get("held_out_hits")
    return Reference(extractor, statistics, tensors["training"], tensors["held_out"], hits, digest=digest)


def real_splits(source: str, channels: int, image_column: str = "image", label_column: str | None = "label") -> list[Images]:
    """The ``train`` and, where there is one, the ``test`` split of a data source."""
    names = ("train", "test") if has_split(source, "test") else ("train",)
    return [load_images(DataConfig(source, name, image_column, label_column), channels) for name in names]


def evaluation_source(recipe: Recipe) -> str | None:
    """The data source that a recipe's samples are scored against; ``None`` without a data set."""
    if recipe.evaluation.data is not None:
        return recipe.evaluation.data
    no_images = recipe.data.source == "teacher" or is_latents_folder(recipe.data.source)
    return None if no_images else recipe.data.source


def evaluation_data(recipe: Recipe) -> DataConfig | None:
    """The data that a recipe's samples are scored against, of prompts without labels; ``None`` without a data set."""
    source = evaluation_source(recipe)
    if source is None or recipe.evaluation.data is None:
        return None if source is None else recipe.data
    return DataConfig(source, label_column=None if recipe.data.prompts else "label")


def recipe_reference(recipe: Recipe) -> Reference | None:
    """What a recipe's samples are scored against; ``None`` without a data set."""
    data = evaluation_data(recipe)
    if data is None:
        return None
    return build_reference(
        data.source, recipe.evaluation.features, recipe.sample_shape[0], data.image_column, data.label_column
    )


def reference_digest(extractor: FeatureExtractor, channels: int, splits: list[Images]) -> str:
    """A hash of what a :class:`Reference` depends on."""
    # A fingerprint of datasets holds each file's path, size and date.
    facts = [extractor.name, extractor.version, channels, TRAINING_SAMPLES, *(images.rows._fingerprint for images in splits)]
    facts += [] if splits[0].label_column else ["no labels"]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def cache_path(extractor: FeatureExtractor, digest: str) -> Path | None:
    """Where these features are kept; ``None`` for an extractor that does not say what it is."""
    if extractor.version is None:
        return None
    return cached_assets_path("scm-distill", "references", extractor.name) / f"{digest[:16]}.safetensors"


def extract_reference(extractor: FeatureExtractor, train: Images, test: Images | None = None) -> dict[str, Tensor]:
    """What a :class:`Reference` holds, as tensors by name."""
    real, unseen = training_and_held_out(train, test)
    features, _ = extract(extractor, real, None)
    held_out, hits = extract(extractor, *unseen)
    statistics = FeatureStatistics().update(features)
    tensors = {
        "count": torch.tensor(statistics.count), "total": statistics.total, "outer": statistics.outer,
        "training": features[:TRAINING_SAMPLES].clone(), "held_out": held_out,
    }  # fmt: skip
    return tensors if hits is None else {**tensors, "held_out_hits": hits}


def training_and_held_out(train: Images, test: Images | None = None) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
    """The training images, and the held-out ones with their labels, each in a fixed random order."""
    pixels, labels = shuffled(train)
    if test is not None:
        return pixels, shuffled(test)
    held = min(len(pixels) // 2, PAIRWISE_SAMPLES)
    return pixels[held:], (pixels[:held], None if labels is None else labels[:held])


def held_out_images(splits: list[Images]) -> tuple[Tensor, Tensor | None]:
    """The images behind ``Reference.held_out``, in its order, and their labels."""
    return shuffled(splits[1]) if len(splits) == 2 else training_and_held_out(*splits)[1]


def shuffled(images: Images) -> tuple[Tensor, Tensor | None]:
    """All images and their labels, if they have some, in one fixed random order."""
    pixels, labels = as_tensors(images)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return pixels[order], labels[order] if images.label_column else None


def evaluate(batches: Iterable[tuple[Tensor, Tensor | None]], reference: Reference) -> dict:
    """Scores of generated batches ``(images in [-1, 1], labels)``, with ``floor``: those of as many real images.

    Raises:
        ValueError: too few samples, or images whose features are not finite.
    """
    extracted = [extract(reference.extractor, x, y if torch.is_tensor(y) else None) for x, y in batches]
    features = torch.cat([f for f, _ in extracted])
    known = all(h is not None for _, h in extracted)
    scores = reference.score(features, torch.cat([h for _, h in extracted]) if known else None)
    floor = reference.floor(len(features))
    return {**scores, "floor": floor} if floor else scores
