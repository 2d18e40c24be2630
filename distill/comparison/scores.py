"""Scores of one set of samples, with bootstrap intervals where these are valid, and of several sets together.

Every score is one of features: their name stands in front of its name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from distill.evaluation import Reference
from distill.evaluation.diversity import (
    bootstrap_interval,
    class_entropy,
    interval_over_seeds,
    mean_pairwise_distance,
    nearest_distances,
    share_interval,
    vendi_score,
    within_classes,
)
from distill.evaluation.metrics import (
    FeatureStatistics,
    frechet_distance,
    kernel_distance,
    neighbour_distances,
    neighbourhoods,
)
from distill.recipe import MINIMUM_SAMPLES

VERSION = 2  # of what is computed below: another one computes the scores anew from the features on disk
KS = (3, 5)  # nearest neighbours
EXTREME = 0.01  # of real images are as near to another one, or to a training image, as what counts as a copy


@dataclass(frozen=True)
class Metric:
    """How a score is shown. ``better``: 1 for higher, -1 for lower, 0 for neither; ``share``: of samples, in per cent."""

    key: str
    table: str  # quality or diversity
    better: int
    explanation: str
    share: bool = False


METRICS = (
    Metric("FD", "quality", -1, "Fréchet distance of Gaussians to all training images; it falls with the number of samples"),
    Metric("KID", "quality", -1, "kernel distance, unbiased: without a difference it scatters around 0"),
    Metric("precision (k=3)", "quality", 1, "samples within reach of a real image", True),
    Metric("precision (k=5)", "quality", 1, "the same with a longer reach", True),
    Metric("density (k=5)", "quality", 1, "real images within whose reach a sample lies, over k"),
    Metric("asked class", "quality", 1, "samples that the classifier sees as the class asked for", True),
    Metric("recall (k=3)", "diversity", 1, "real images within reach of a sample", True),
    Metric("recall (k=5)", "diversity", 1, "the same with a longer reach", True),
    Metric("coverage (k=5)", "diversity", 1, "real images that have a sample within their reach", True),
    Metric("Vendi", "diversity", 1, "effective number of different samples (cosine kernel)"),
    Metric("Vendi in a class", "diversity", 1, "the same within each class, averaged"),
    Metric("distance in a class", "diversity", 1, "mean distance of two samples of a class"),
    Metric("class entropy", "diversity", 1, "of the histogram of classes seen, in nats"),
    Metric("near duplicates", "diversity", -1, "samples nearer to another one than all but 1 % of real images are", True),
    Metric("nearest training image", "diversity", 0, "median distance to it"),
    Metric("memorised", "diversity", -1, "samples nearer to it than all but 1 % of held-out images are", True),
)  # fmt: skip


@dataclass(frozen=True)
class Samples:
    """What is kept of a point's samples: features ``(N, D)``, the class asked for and the class seen, ``(N,)`` each or
    ``None``.
    """

    features: Tensor
    asked: Tensor | None
    seen: Tensor | None

    @property
    def classes(self) -> Tensor | None:
        """Those that diversity is measured within: as seen, which leaves out what was drawn wrongly; else as asked for."""
        return self.asked if self.seen is None else self.seen


class Scorer:
    """Scores samples against a :class:`Reference`.

    Args:
        real: the held-out images, the floor: what counts as a near duplicate or as memorised is what hardly ever happens
            among them. Without at least 50 of them there are no such scores.
        num_classes: that the classifier or the models know.
    """

    def __init__(self, reference: Reference, real: Samples | None, num_classes: int | None):
        self.reference, self.num_classes = reference, num_classes
        self.name = reference.extractor.name
        self.real = real if real is not None and len(real.features) >= MINIMUM_SAMPLES else None
        self.reach: dict[int, Tensor] = {}  # of as many real images as there are samples

    def neighbours_of_real(self, num: int) -> Tensor:
        if num not in self.reach:
            self.reach[num] = neighbour_distances(self.reference.training[:num], max(KS))
        return self.reach[num]

    @cached_property
    def memorised_below(self) -> float:
        return nearest_distances(self.real.features, self.reference.training)[0].quantile(EXTREME).item()

    def duplicate_below(self, num: int) -> float:
        return neighbour_distances(self.real.features[:num], 1)[:, 0].quantile(EXTREME).item()

    def score(self, samples: Samples) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Scores by name, and intervals of those that are a statistic of single samples, see :func:`interval`."""
        if len(samples.features) < MINIMUM_SAMPLES:
            raise ValueError(f"scores need at least {MINIMUM_SAMPLES} samples, got {len(samples.features)}")
        values, of_each = {}, {}
        self.compare_pairs(samples.features, values, of_each)
        self.compare_with_training(samples.features, values, of_each)
        self.measure_classes(samples, values, of_each)
        values["Vendi"] = vendi_score(samples.features)
        for key, (statistic, each) in of_each.items():
            values[key] = statistic(each)
        intervals = {key: list(interval(statistic, each)) for key, (statistic, each) in of_each.items()}
        named = {m.key: f"{self.name}-{m.key}" for m in METRICS}
        ordered = {named[m.key]: values[m.key] for m in METRICS if m.key in values}
        return ordered, {named[key]: interval for key, interval in intervals.items()}

    def compare_pairs(self, features: Tensor, values: dict, of_each: dict) -> None:
        """Precision, recall and what else compares pairs: equally many on both sides."""
        pair = min(len(features), len(self.reference.training))
        real, fake = self.reference.training[:pair], features[:pair]
        near = neighbourhoods(real, fake, KS, self.neighbours_of_real(pair))
        values["FD"] = frechet_distance(self.reference.statistics, FeatureStatistics().update(features))
        values["KID"] = kernel_distance(real, fake)
        for k in KS:
            of_each[f"precision (k={k})"] = (share, near.inside[k])
            values[f"recall (k={k})"] = share(near.covered[k])
        of_each[f"density (k={KS[-1]})"] = (share, near.density)
        values[f"coverage (k={KS[-1]})"] = share(near.held)

    def compare_with_training(self, features: Tensor, values: dict, of_each: dict) -> None:
        distances, _ = nearest_distances(features, self.reference.training)
        of_each["nearest training image"] = (median, distances)
        if self.real is None:
            return
        of_each["memorised"] = (share, distances < self.memorised_below)
        num = min(len(features), len(self.real.features))  # a nearest distance falls with the number of samples
        nearest = neighbour_distances(features[:num], 1)[:, 0]
        values["near duplicates"] = share(nearest < self.duplicate_below(num))

    def measure_classes(self, samples: Samples, values: dict, of_each: dict) -> None:
        if samples.asked is not None and samples.seen is not None:
            of_each["asked class"] = (share, samples.asked == samples.seen)
        if samples.seen is not None:
            values["class entropy"] = class_entropy(samples.seen, self.num_classes or 1)
        if samples.classes is None:
            return
        counts = torch.bincount(samples.classes)
        enough = counts[samples.classes] >= 2  # a class seen once has no distances
        if enough.any():
            features, classes = samples.features[enough], samples.classes[enough]
            values["Vendi in a class"] = within_classes(vendi_score, features, classes)
            values["distance in a class"] = within_classes(mean_pairwise_distance, features, classes)


def share(values: Tensor) -> float:
    return values.double().mean().item()


def median(values: Tensor) -> float:
    return values.double().median().item()


def interval(statistic: Callable[[Tensor], float], each: Tensor) -> tuple[float, float]:
    """95 % interval of a statistic of single samples: Wilson's of a share, else by bootstrap."""
    if each.dtype == torch.bool:
        return share_interval(statistic(each), len(each))
    return bootstrap_interval(statistic, each)


def combine(points: list[dict]) -> dict[str, dict]:
    """Each score of the same row for several seeds: its mean, the ends of its 95 % interval and where that comes from."""
    found = {}
    for key in points[0]["scores"]:
        is_share = any(m.share and key.endswith(f"-{m.key}") for m in METRICS)
        value, ends, source = combined([p["scores"][key] for p in points], points[0]["intervals"].get(key))
        if ends is not None and is_share:
            ends = [min(max(end, 0.0), 1.0) for end in ends]
            if ends[0] == ends[1]:  # seeds that agree, as all of them at 0 or 1, do not make it certain
                ends = list(share_interval(value, sum(p["num_samples"] for p in points)))
        found[key] = {"value": value, "interval": ends, "from": source}
    return found


def combined(values: list[float], of_one: list[float] | None) -> tuple[float, list[float] | None, str | None]:
    if len(values) >= 2:
        mean, half = interval_over_seeds(values)
        return mean, [mean - half, mean + half], f"{len(values)} seeds"
    return values[0], of_one, None if of_one is None else "one set of samples"


def outside(score: dict, other: dict) -> int:
    """1 or -1 if a score lies above or below another one and their intervals do not touch, else 0."""
    (low, high), (other_low, other_high) = score["interval"], other["interval"]
    return int(low > other_high) - int(high < other_low)
