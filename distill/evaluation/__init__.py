"""Scores of generated images against real ones, each with the score of unseen real images beside it."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from distill.data import as_tensors, load_images
from distill.evaluation.features import FeatureExtractor, load_features
from distill.evaluation.metrics import (
    FeatureStatistics,
    density_coverage,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from distill.evaluation.table import format_table
from distill.recipe import DataConfig

__all__ = ["Reference", "build_reference", "evaluate", "format_table"]

MINIMUM_SAMPLES = 50
# Rows for the metrics that compare all pairs; the Fréchet distance uses every image.
PAIRWISE_SAMPLES = 10_000


@dataclass(frozen=True)
class Reference:
    """What samples are scored against: statistics of all training images, a random subset of their features, and
    features of the held-out split, which scored the same way are the real-against-real floor.
    """

    extractor: FeatureExtractor
    statistics: FeatureStatistics
    rows: Tensor  # (<= PAIRWISE_SAMPLES, D), in random order
    held_out: Tensor  # (N, D), in random order
    held_out_hits: Tensor | None  # (N,) whether the classifier sees the true class

    def floor(self, num: int) -> dict:
        """Scores of ``num`` held-out real images (all of them if there are fewer)."""
        return self.score(self.held_out[:num], None if self.held_out_hits is None else self.held_out_hits[:num])

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
    """Features ``(N, D)`` of images on their device and whether each is seen as its label."""
    features, hits = [], []
    for start in range(0, len(images), 500):
        batch = images[start : start + 500].cpu()
        features.append(extractor.extract(batch))
        if extractor.classify is not None and labels is not None:
            hits.append(extractor.classify(batch) == labels[start : start + 500].cpu())
    return torch.cat(features), torch.cat(hits) if hits else None


@lru_cache(maxsize=4)
def build_reference(source: str = "mnist", features: str | FeatureExtractor = "MNIST-CNN", channels: int = 1):
    """The :class:`Reference` of a data source that has ``train`` and ``test`` splits."""
    extractor = load_features(features)
    parts = {}
    for split in ("train", "test"):
        images, labels = as_tensors(load_images(DataConfig(source, split), channels))
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        parts[split] = extract(extractor, images[order], labels[order])
    train, (held_out, hits) = parts["train"][0], parts["test"]
    return Reference(extractor, FeatureStatistics().update(train), train[:PAIRWISE_SAMPLES], held_out, hits)


def evaluate(batches: Iterable[tuple[Tensor, Tensor | None]], reference: Reference) -> dict:
    """Scores of generated batches ``(images in [-1, 1], labels)``, with ``floor``: those of as many real images.

    Raises:
        ValueError: too few samples, or images whose features are not finite.
    """
    extracted = [extract(reference.extractor, images, labels) for images, labels in batches]
    features = torch.cat([f for f, _ in extracted])
    known = all(h is not None for _, h in extracted)
    scores = reference.score(features, torch.cat([h for _, h in extracted]) if known else None)
    return {**scores, "floor": reference.floor(len(features))}
