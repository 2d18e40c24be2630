"""How much samples differ: measures of diversity on features, in fp64 and in chunks, and intervals for all scores.

Every one of them depends on the features: their name belongs in front of each figure.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from distill.evaluation import metrics
from distill.evaluation.metrics import check_features, check_pair, distance_rows

# Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond them it is that of the normal distribution.
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}
NORMAL = 1.96


def vendi_score(features: Tensor) -> float:
    """The Vendi score (arXiv 2210.02410) with the cosine kernel: the exponential of the entropy of the eigenvalues of
    ``K / N``, between 1 (all alike) and ``min(N, D)``. In its dual form: those of ``X^T X / N`` ``(D, D)`` are the same.

    Raises:
        ValueError: no samples, or a feature vector that is zero and has no direction.
    """
    check_features(features)
    norms = features.double().norm(dim=1, keepdim=True)
    if len(features) == 0 or (norms == 0).any():
        raise ValueError("the Vendi score needs samples whose feature vectors are not zero")
    x = features.double() / norms
    values = torch.linalg.eigvalsh(x.T @ x / len(x)).clamp(min=0)
    return torch.special.entr(values).sum().exp().item()


def mean_pairwise_distance(features: Tensor) -> float:
    """The mean Euclidean distance of two different samples.

    Raises:
        ValueError: fewer than 2 samples.
    """
    check_pair(features, features, minimum=2)
    total = sum(rows.sum().item() for _, rows in distance_rows(features, features))
    return total / (len(features) * (len(features) - 1))


def within_classes(measure: Callable[[Tensor], float], features: Tensor, classes: Tensor, minimum: int = 2) -> float:
    """The mean of a measure over the classes ``(N,)`` of the samples, each class by itself.

    Raises:
        ValueError: a class that has samples, but fewer than ``minimum``.
    """
    values = []
    for c in classes.unique().tolist():
        own = features[classes == c]
        if len(own) < minimum:
            raise ValueError(f"this measure needs at least {minimum} samples of each class, class {c} has {len(own)}")
        values.append(measure(own))
    return sum(values) / len(values)


def class_entropy(classes: Tensor, num_classes: int) -> float:
    """Entropy in nats of the histogram of classes ``(N,)``: ``log(num_classes)`` where all are equally frequent.

    Raises:
        ValueError: no samples.
    """
    if len(classes) == 0:
        raise ValueError("the entropy of classes needs at least 1 sample")
    shares = torch.bincount(classes, minlength=num_classes).double() / len(classes)
    return torch.special.entr(shares).sum().item()


def nearest_distances(features: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """For every sample the distance to the nearest training image and its index, ``(N,)`` each. Samples that lie much nearer
    than unseen real images do are memorised.

    The nearest one is looked for in fp32, for half the time; the distance to it is exact.
    """
    check_pair(training, features, minimum=1)
    parts = features.float().split(metrics.CHUNK)
    indices = torch.cat([torch.cdist(part, training.float()).argmin(dim=1) for part in parts])
    return (features.double() - training[indices].double()).norm(dim=1), indices


def near_duplicates(features: Tensor, num: int = 10) -> list[tuple[float, int, int]]:
    """The ``num`` pairs of samples that are nearest to each other, as ``(distance, i, j)`` with ``i < j``, nearest first; no
    sample is in more than one of them.

    Raises:
        ValueError: fewer than 2 samples.
    """
    check_pair(features, features, minimum=2)
    pairs = []
    for part, rows in distance_rows(features, features):
        own = torch.arange(part.start, part.stop, device=rows.device)
        rows[own - part.start, own] = math.inf
        distance, other = rows.min(dim=1)
        pairs += zip(distance.tolist(), own.tolist(), other.tolist(), strict=True)
    chosen, used = [], set()
    for distance, i, j in sorted(pairs):
        if len(chosen) < num and not used & {i, j}:
            chosen.append((distance, min(i, j), max(i, j)))
            used |= {i, j}
    return chosen


def bootstrap_interval(
    statistic: Callable[[Tensor], float], values: Tensor, resamples: int = 200, seed: int = 0
) -> tuple[float, float]:
    """A 95 % interval of a statistic of rows, from as many rows drawn with replacement (percentile bootstrap).

    Not for measures that compare rows with each other: a row drawn twice is its own duplicate.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = [statistic(values[torch.randint(len(values), (len(values),), generator=generator)]) for _ in range(resamples)]
    low, high = torch.tensor(draws, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return low.item(), high.item()


def share_interval(share: float, num: int) -> tuple[float, float]:
    """The 95 % interval of a share of ``num`` independent samples (Wilson's score interval); it is not empty at 0 and 1."""
    z = NORMAL / math.sqrt(num)
    center, half = share + z * z / 2, z * math.sqrt(share * (1 - share) + z * z / 4)
    # Rounding must not leave the share itself outside.
    return max(min((center - half) / (1 + z * z), share), 0.0), min(max((center + half) / (1 + z * z), share), 1.0)


def interval_over_seeds(values: list[float]) -> tuple[float, float]:
    """The mean of a score over seeds and the half width of its 95 % interval (Student's t).

    Raises:
        ValueError: fewer than 2 seeds.
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"an interval over seeds needs at least 2 of them, got {n}")
    v = torch.tensor(values, dtype=torch.float64)
    return v.mean().item(), STUDENT_T.get(n - 1, NORMAL) * v.std().item() / math.sqrt(n)
