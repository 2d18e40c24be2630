"""What can be a row of a comparison: a model, which draws samples, or images that are there already."""

import hashlib
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import teachers
from distill.comparison.config import ModelConfig
from distill.data import Images, image_labels, load_images
from distill.device import default_device
from distill.model import DEFAULT_STEPS, Model
from distill.recipe import MINIMUM_SAMPLES, DataConfig
from distill.sampling import count_evaluations, cycle_labels, device_of, draw
from distill.schedule import sample_seeds, student_times
from distill.shards import file_hash, model_hash
from teachers import Teacher
from teachers.pretrained import WEIGHTS

DEFAULT_STUDENT_STEPS = [1, 2, 4]


@dataclass(frozen=True)
class Point:
    """One set of samples. ``facts`` is all that they depend on; ``nfe`` how often the network is called for an image."""

    entry: "ModelEntry | ImagesEntry"
    steps: int | None
    guidance: float | None
    seed: int | None
    num: int
    nfe: int | None = None
    facts: dict = field(default_factory=dict, compare=False)

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:24]

    @property
    def title(self) -> str:
        parts = [self.entry.name]
        parts += [] if self.steps is None else [f"{self.steps} step{'s' * (self.steps > 1)}"]
        parts += [] if self.guidance is None else [f"guidance {self.guidance:g}"]
        parts += [] if self.seed is None else [f"seed {self.seed}"]
        return ", ".join(parts)


class ModelEntry:
    """A teacher or a student, checked against what is asked of it before anything is drawn.

    Args:
        source: the model, or one of the several that ``config`` lists.
        mixed_precision: that it is evaluated in.

    Raises:
        FileNotFoundError, ValueError: no such model; steps, a solver or guidance scales that it cannot have; or its samples
            are no images.
    """

    def __init__(self, config: ModelConfig, source: str, scales: list[float], mixed_precision: str):
        self.name, self.source, self.solver = config.name, source, config.solver or "heun"
        self.mixed_precision = mixed_precision
        self.config = teachers.load_config(source)
        self.role = self.config["role"]
        network = self.load()
        self.sample_shape, self.num_classes = network.sample_shape, network.num_classes
        if network.latents or network.text_condition is not None:
            what = "prompts" if network.text_condition is not None else "latents"
            raise ValueError(f"model {self.name!r} is one of {what}; write its images to a folder and compare that (images)")
        self.accepts_guidance = network.accepts_guidance
        if self.role == "student" and config.solver is not None:
            raise ValueError(f"model {self.name!r} is a student and solves no ODE; remove solver")
        self.steps = self.checked_steps(config.steps)
        self.scales = self.checked_scales(config.guidance_scales, scales)
        self.sha256 = weights_hash(source)
        self.digest = model_hash(network, {k: v for k, v in self.config.items() if k in DETERMINING})
        self.sampler: Model | None = None

    def load(self) -> Teacher:
        return teachers.load(self.source, default_device()).requires_grad_(False)

    def checked_steps(self, steps: list[int] | None) -> list[int]:
        if self.role == "teacher":
            return [DEFAULT_STEPS["teacher"]] if steps is None else steps
        steps = DEFAULT_STUDENT_STEPS if steps is None else steps
        for n in steps:
            self.times(n)
        return steps

    def times(self, steps: int) -> list[float] | None:
        """When a student is evaluated."""
        if self.role == "teacher":
            return None
        try:
            return self.config.get("sampling", {}).get(str(steps)) or student_times(steps, self.config["sigma_data"])
        except ValueError as error:
            raise ValueError(f"model {self.name!r}: {error}") from None

    def checked_scales(self, own: list[float] | None, common: list[float]) -> list[float]:
        """The guidance scales of this model's points: those asked for, or the only one that it has."""
        if self.role == "teacher" and self.num_classes is None:
            return self.only_scale(1.0, own, "is an unconditional teacher and cannot be guided: its only guidance scale is")
        if self.role == "teacher":
            return common if own is None else own
        if not self.accepts_guidance:
            return self.only_scale(self.config.get("guidance_scale", 1.0), own, "was distilled at the fixed guidance scale")
        low, high = self.config.get("guidance_range") or (1.0, float("inf"))
        scales = common if own is None else own
        if outside := [w for w in scales if not low <= w <= high]:
            raise ValueError(
                f"model {self.name!r} was distilled at guidance scales from {low:g} to {high:g}, and is asked for "
                f"{outside[0]:g}; give it guidance_scales of its own"
            )
        return scales

    def only_scale(self, scale: float, own: list[float] | None, why: str) -> list[float]:
        if own not in (None, [scale]):
            raise ValueError(f"model {self.name!r} {why} {scale:g}; remove its guidance_scales")
        return [scale]

    def points(self, num: int, seeds: list[int], features: str) -> list[Point]:
        """One for every number of steps, guidance scale and seed; the first seed of all of them comes first."""
        combinations = itertools.product(seeds, self.steps, self.scales)
        return [self.point(steps, scale, seed, num, features) for seed, steps, scale in combinations]

    def point(self, steps: int, scale: float, seed: int, num: int, features: str) -> Point:
        facts = {
            "model": self.digest, "role": self.role, "steps": steps, "guidance": scale, "seed": seed, "num": num,
            "solver": self.solver if self.role == "teacher" else None, "times": self.times(steps), "features": features,
        }  # fmt: skip
        facts |= {} if self.mixed_precision == "no" else {"mixed_precision": self.mixed_precision}
        return Point(self, steps, scale, seed, num, self.evaluations(steps, scale), facts)

    def evaluations(self, steps: int, scale: float) -> int:
        """Of the network for one image. Guidance of a teacher takes each of them with the class and once more without."""
        if self.role == "student":
            return steps
        return count_evaluations(steps, self.solver) * (1 if scale == 1.0 else 2)

    def guidance_input(self, scale: float) -> float | None:
        """What the sampler is told: nothing where the scale is fixed, or where a teacher needs no second evaluation."""
        if self.role == "teacher":
            return None if scale == 1.0 else scale
        return scale if self.accepts_guidance else None

    def draw(self, point: Point, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None, float]]:
        """Batches of images on the CPU, their labels, and the seconds that each took."""
        seeds = sample_seeds(point.num, torch.Generator().manual_seed(point.seed))
        yield from self.drawn(point, seeds, self.labels(point.num), batch_size)

    def drawn(self, point: Point, seeds: list[int], labels: Tensor | None, batch_size: int):
        if self.sampler is None:
            self.sampler = Model(self.load(), self.config)
        start = time.perf_counter()
        guidance, times = self.guidance_input(point.guidance), self.times(point.steps)
        if labels is not None:
            labels = labels.to(device_of(self.sampler.network))
        batches = draw(
            self.sampler.network, seeds, labels, point.steps, self.role, batch_size, times, guidance, self.solver,
            self.mixed_precision,
        )  # fmt: skip
        for images, used in batches:
            images = images.cpu()  # waits until they are there
            yield images, None if used is None else used.cpu(), time.perf_counter() - start
            start = time.perf_counter()

    def labels(self, num: int) -> Tensor | None:
        return cycle_labels(self, num)

    def images_at(self, point: Point, indices: list[int]) -> Tensor:
        """These of the point's samples, drawn again: each depends on its own seed and label alone."""
        seeds = sample_seeds(point.num, torch.Generator().manual_seed(point.seed))
        labels = self.labels(point.num)
        chosen = None if labels is None else labels[indices]
        return torch.cat([x for x, _, _ in self.drawn(point, [seeds[i] for i in indices], chosen, len(indices))])

    def release(self) -> None:
        """Free the network until it is needed again."""
        self.sampler = None


def read_models(config: ModelConfig, scales: list[float], mixed_precision: str) -> list[ModelEntry]:
    """A model's entries: one, or where several students are listed one for the scale of each.

    Raises:
        FileNotFoundError, ValueError: as :class:`ModelEntry`; or what is listed is not a student of one scale, or two are of
            the same.
    """
    entries = [ModelEntry(config, source, scales, mixed_precision) for source in config.sources]
    if len(entries) < 2:
        return entries
    found: dict[float, str] = {}
    for entry in entries:
        where = f"model {config.name!r} lists several sources, which must be students, each of one guidance scale of its own"
        if entry.role == "teacher" or entry.accepts_guidance:
            kind = "a teacher" if entry.role == "teacher" else "a student of a range of scales"
            raise ValueError(f"{where}; {entry.source!r} is {kind}")
        if entry.scales[0] in found:
            raise ValueError(f"{where}; {found[entry.scales[0]]!r} and {entry.source!r} are both of {entry.scales[0]:g}")
        found[entry.scales[0]] = entry.source
    return sorted(entries, key=lambda entry: entry.scales)


# Keys of a model's config that say which function its weights are.
DETERMINING = ("network", "network_config", "parameterization", "sigma_data", "sample_shape", "num_classes", "label_format")


def weights_hash(source: str) -> str | None:
    """SHA-256 of the file with a model's weights, as ``sha256sum`` prints it; ``None`` if they are in several."""
    path = teachers.pretrained.resolve(source)
    if path.is_dir() and (path / WEIGHTS).is_file():
        path = path / WEIGHTS
    elif path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        path = files[0] if len(files) == 1 else path
    return file_hash(path) if path.is_file() else None


class ImagesEntry:
    """Images that are there already: a point without steps and guidance.

    Args:
        role: ``images``, or ``real`` for the held-out ones that are the floor.
        pixels, labels: ``(N, C, H, W)`` in [-1, 1] and ``(N,)``.
    """

    def __init__(self, name: str, role: str, pixels: Tensor, labels: Tensor | None, facts: dict, source: str):
        self.name, self.role, self.source = name, role, source
        self.pixels, self.own_labels, self.facts = pixels, labels, facts
        self.sample_shape, self.num_classes = tuple(pixels.shape[1:]), None
        self.sha256 = None

    def points(self, num: int, seeds: list[int], features: str) -> list[Point]:
        num = min(num, len(self.pixels))
        return [Point(self, None, None, None, num, None, {**self.facts, "num": num, "features": features})]

    def draw(self, point: Point, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None, float]]:
        for start in range(0, point.num, batch_size):
            part = slice(start, min(start + batch_size, point.num))
            yield self.pixels[part], None if self.own_labels is None else self.own_labels[part], 0.0

    def labels(self, num: int) -> Tensor | None:
        return None if self.own_labels is None else self.own_labels[:num]

    def images_at(self, point: Point, indices: list[int]) -> Tensor:
        return self.pixels[indices]

    def release(self) -> None:
        pass


def read_images(config: ModelConfig, sample_shape: tuple[int, ...], num: int) -> ImagesEntry:
    """At most ``num`` images of a folder, a random choice that is always the same.

    Raises:
        FileNotFoundError, ValueError: no such folder, nothing in it that can be read, too few images, or of another shape.
    """
    where = f"model {config.name!r}"
    data = DataConfig(config.images, config.split, config.image_column, config.label_column)
    images = load_images(data, sample_shape[0])
    if len(images) < MINIMUM_SAMPLES:
        raise ValueError(f"{where}: {config.images!r} holds {len(images)} images, scores need at least {MINIMUM_SAMPLES}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:num].tolist()
    chosen = Images(images.rows.select(order), config.image_column, config.label_column, sample_shape[0])
    try:
        pixels = [images[i][0] for i in order]
    except ValueError as error:
        raise ValueError(f"{where}: {config.images!r}: {error}") from None
    for x in pixels:
        if tuple(x.shape) != tuple(sample_shape):
            raise ValueError(
                f"{where}: images of {config.images!r} have shape {list(x.shape)}, the others {list(sample_shape)}"
            )
    pixels = torch.stack(pixels)
    facts = {"pixels": hashlib.sha256(pixels.numpy().tobytes()).hexdigest()}
    return ImagesEntry(config.name, "images", pixels, image_labels(chosen), facts, str(Path(config.images)))
