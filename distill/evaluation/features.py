"""Feature extractors that metrics are computed on. A score is only comparable with scores on the same features."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.data import ASSETS
from distill.evaluation.classifier import MNISTClassifier
from teachers.pretrained import load_tensors, read_safetensors


@dataclass(frozen=True)
class FeatureExtractor:
    """``extract`` maps images ``(N, C, H, W)`` in [-1, 1] to features ``(N, D)``; ``classify`` to class indices.

    ``sample_shape`` is the only ``(C, H, W)`` it takes, if there is only one.

    ``name`` stands in front of every score: scores on different features are not comparable. ``version`` says which
    weights they are; features of real images are kept on disk by name and version, and without one not at all.
    """

    name: str
    extract: Callable[[Tensor], Tensor]
    classify: Callable[[Tensor], Tensor] | None = None
    version: str | None = None
    sample_shape: tuple[int, ...] | None = None


def mnist_cnn() -> FeatureExtractor:
    """The bundled MNIST classifier: 128-d features, and the class it sees."""
    model = MNISTClassifier().eval().requires_grad_(False)
    path = ASSETS / "mnist-cnn.safetensors"
    load_tensors(model, read_safetensors(path), str(path))
    version = hashlib.sha256(path.read_bytes()).hexdigest()
    return FeatureExtractor("MNIST-CNN", model.features, lambda images: model(images).argmax(1), version, (1, 28, 28))


def pixels() -> FeatureExtractor:
    """Average-pooled pixels, at most 16 x 16: for data without a fitting network."""
    return FeatureExtractor("pixels", lambda x: torch.nn.functional.adaptive_avg_pool2d(x, 16).flatten(1))


EXTRACTORS: dict[str, Callable[[], FeatureExtractor]] = {"MNIST-CNN": mnist_cnn, "pixels": pixels}


def default_features(source: str) -> str:
    """The extractor for a data source that none was chosen for."""
    return "MNIST-CNN" if source == "mnist" else "pixels"


def load_features(name: str | FeatureExtractor) -> FeatureExtractor:
    """An extractor by name, or one of your own as it is.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(name, FeatureExtractor):
        return name
    if name not in EXTRACTORS:
        raise ValueError(f"features are {name!r}; allowed: {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name]()
