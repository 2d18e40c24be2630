"""Distances between sets of features, streaming or in chunks, in fp64."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1000  # rows of a distance matrix held at once: 1000 x 50,000 fp64 is 0.4 GB


class FeatureStatistics:
    """Mean and covariance of features, from batches. ``update`` with ``(N, D)``; fp64 accumulators.

    Raises:
        ValueError: features that are not finite or change their dimension; fewer than 2 samples.
    """

    def __init__(self):
        self.count = 0
        self.total: Tensor | None = None
        self.outer: Tensor | None = None

    def update(self, features: Tensor) -> "FeatureStatistics":
        check_features(features)
        features = features.double()
        if self.total is None:
            dim = features.shape[1]
            self.total, self.outer = features.new_zeros(dim), features.new_zeros(dim, dim)
        if features.shape[1] != len(self.total):
            raise ValueError(f"features have {features.shape[1]} dimensions, earlier ones had {len(self.total)}")
        self.count += len(features)
        self.total += features.sum(0)
        self.outer += features.T @ features
        return self

    @property
    def mean(self) -> Tensor:
        self.require(1)
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance ``(D, D)``."""
        self.require(2)
        return (self.outer - self.count * self.mean.outer(self.mean)) / (self.count - 1)

    def require(self, minimum: int) -> None:
        if self.count < minimum:
            raise ValueError(f"this statistic needs at least {minimum} samples, got {self.count}")


def check_features(features: Tensor) -> None:
    if features.ndim != 2:
        raise ValueError(f"features must be (N, D), got shape {list(features.shape)}")
    if not torch.isfinite(features).all():
        raise ValueError("features contain NaN or infinity; the images they come from are broken")


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared Fréchet distance between Gaussians (arXiv 1706.08500),
    ``|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))``; the last trace is that of ``(S_a^(1/2) S_b S_a^(1/2))^(1/2)``.
    """
    root = symmetric_sqrt(a.covariance)
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(distance.item(), 0.0)


def symmetric_sqrt(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """Unbiased squared MMD with the kernel ``(x.y / D + 1)^3`` (KID, arXiv 1801.01401), over all pairs, in chunks.

    Args:
        real, fake: features ``(N, D)`` and ``(M, D)``, at least 2 each.
    """
    check_pair(real, fake, minimum=2)
    real, fake = real.double(), fake.double()
    within = [(kernel_sum(x, x) - kernel_diagonal(x)) / (len(x) * (len(x) - 1)) for x in (real, fake)]
    return (sum(within) - 2 * kernel_sum(real, fake) / (len(real) * len(fake))).item()


def kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    return sum((rows @ y.T / y.shape[1] + 1).pow(3).sum() for rows in x.split(CHUNK))


def kernel_diagonal(x: Tensor) -> Tensor:
    return (x.square().sum(1) / x.shape[1] + 1).pow(3).sum()


def check_pair(real: Tensor, fake: Tensor, minimum: int) -> None:
    check_features(real)
    check_features(fake)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"real features have {real.shape[1]} dimensions, generated ones {fake.shape[1]}")
    if min(len(real), len(fake)) < minimum:
        raise ValueError(f"this metric needs at least {minimum} samples on each side, got {len(real)} and {len(fake)}")


def distance_rows(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Euclidean distances ``(chunk, M)`` from rows of ``x`` to all of ``y``."""
    for start in range(0, len(x), CHUNK):
        part = slice(start, min(start + CHUNK, len(x)))
        yield part, torch.cdist(x[part].double(), y.double())


def neighbour_radii(x: Tensor, k: int) -> Tensor:
    """Distance of every row to its ``k``-th nearest other row, ``(N,)``."""
    return neighbour_distances(x, k)[:, k - 1]


def neighbour_distances(x: Tensor, k: int) -> Tensor:
    """Distances of every row to its ``k`` nearest other rows, ``(N, k)``, nearest first."""
    # The nearest row is the row itself, at distance 0.
    return torch.cat([rows.topk(k + 1, dim=1, largest=False).values[:, 1:] for _, rows in distance_rows(x, x)])


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991): the share of generated features inside the k-nearest-neighbour
    manifold of the real ones, and the reverse.
    """
    check_pair(real, fake, minimum=k + 1)
    return covered_share(fake, real, k), covered_share(real, fake, k)


def covered_share(points: Tensor, support: Tensor, k: int) -> float:
    radii = neighbour_radii(support, k)
    return torch.cat([(rows <= radii).any(1) for _, rows in distance_rows(points, support)]).double().mean().item()


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """Density and coverage (arXiv 2002.09797): how many real balls a generated feature lies in, over ``k``; and the
    share of real balls that hold a generated feature.
    """
    check_pair(real, fake, minimum=k + 1)
    radii = neighbour_radii(real, k)
    inside, covered = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for _, rows in distance_rows(fake, real):
        within = rows <= radii
        inside += within.sum().item()
        covered |= within.any(0)
    return inside / (k * len(fake)), covered.double().mean().item()


@dataclass(frozen=True)
class Neighbourhoods:
    """What the pairs of real and generated features say, for several ``k`` at once.

    Attributes:
        inside: for each ``k`` whether a generated feature lies in the manifold of the real ones, ``(M,)``; its mean is the
            precision.
        covered: for each ``k`` whether a real one lies in the manifold of the generated ones, ``(N,)``: recall.
        density: of each generated feature, for the largest ``k``, ``(M,)``.
        held: whether the ball of a real feature holds a generated one, for the largest ``k``, ``(N,)``: coverage.
        nearest: distance of each generated feature to the nearest other one, ``(M,)``.
    """

    inside: dict[int, Tensor]
    covered: dict[int, Tensor]
    density: Tensor
    held: Tensor
    nearest: Tensor


def neighbourhoods(
    real: Tensor, fake: Tensor, ks: tuple[int, ...] = (3, 5), real_distances: Tensor | None = None
) -> Neighbourhoods:
    """:func:`precision_recall` and :func:`density_coverage` sample by sample, from one pass over the pairs.

    Args:
        real_distances: :func:`neighbour_distances` of ``real`` for the largest ``k``, if they are known.
    """
    most = max(ks)
    check_pair(real, fake, minimum=most + 1)
    reach = neighbour_distances(real, most) if real_distances is None else real_distances
    own = neighbour_distances(fake, most)
    inside, held = {k: [] for k in ks}, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered, density = {k: held.clone() for k in ks}, []
    for part, rows in distance_rows(fake, real):
        for k in ks:
            within = rows <= reach[:, k - 1]
            inside[k].append(within.any(1))
            covered[k] |= (rows <= own[part, k - 1 : k]).any(0)
            if k == most:
                density.append(within.sum(1) / k)
                held |= within.any(0)
    return Neighbourhoods({k: torch.cat(v) for k, v in inside.items()}, covered, torch.cat(density), held, own[:, 0])
