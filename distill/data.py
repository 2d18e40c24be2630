"""Training data: images that are bundled, on disk, from a hub, or drawn once from the teacher; or cached latents."""

import io
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import torch
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from PIL import ExifTags, Image, ImageOps
from pyarrow.compute import struct_field
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate
from tqdm import tqdm

from distill.latents import Latents, is_latents_folder
from distill.prompts import Prompts
from distill.recipe import DataConfig, Recipe
from distill.sampling import generate
from distill.shards import model_hash
from teachers import Teacher
from teachers.condition import Condition, Embeddings
from teachers.pretrained import read_safetensors, write_atomically

ASSETS = Path(__file__).parent / "assets"
SIGMA_DATA_TOLERANCE = 0.05
MODES = {1: "L", 3: "RGB"}


class Images(Dataset):
    """An HF dataset as pairs of an image ``(C, H, W)``, float32 in [-1, 1], and an integer label (0 if there is none).

    All images are of one size; one of another cannot be read.
    """

    def __init__(self, rows: datasets.Dataset, image_column: str, label_column: str | None, channels: int):
        self.rows, self.image_column, self.label_column = rows, image_column, label_column
        self.mode = MODES[channels]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with self.one_sentence(index):
            row = self.rows[index]
            image = torch.from_numpy(self.pixels(row[self.image_column])).float() / 127.5 - 1
        return image, row[self.label_column] if self.label_column else 0

    @contextmanager
    def one_sentence(self, index: int):
        """Errors of PIL, of which there are many kinds, as a ``ValueError`` that says which image."""
        try:
            yield
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"image {index} of column {self.image_column!r} cannot be read: {reason}") from error

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height of the first image."""
        return self.rows[0][self.image_column].size

    def pixels(self, image: Image.Image) -> np.ndarray:
        """uint8 ``(C, H, W)``."""
        if image.size != self.size:  # before its pixels are, which may be a thousand times as many
            raise ValueError("it has {}x{} pixels, the first one {}x{}".format(*image.size, *self.size))
        pixels = np.array(image.convert(self.mode))
        return pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)


def open_rows(source: str, split: str) -> datasets.Dataset:
    """``source``: ``mnist`` (bundled), a parquet file or folder of them, an image folder, or a hub id (``owner/name``, or
    ``hf://owner/name``).

    Raises:
        FileNotFoundError: nothing on disk by that name, nor on the hub.
        ValueError: it cannot be read as images.
    """
    if source == "mnist":
        source = str(ASSETS / "mnist")
    path = Path(source)
    if path.is_file():
        return load("parquet", source, data_files=[str(path)], split="train")
    if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
        raise PermissionError(f"data source {source!r} cannot be read: permission denied")
    if path.is_dir() and (files := sorted(str(f) for f in path.glob(f"{split}*.parquet"))):
        return load("parquet", source, data_files=files, split="train")
    if path.is_dir():
        return load("imagefolder", source, data_dir=source, split=split)
    return load(on_hub(source), source, split=split)


def on_hub(source: str) -> str:
    """The id of a data set on the hub. The hub is asked once: ``datasets`` asks six times before it looks into its cache.

    Raises:
        FileNotFoundError: it is nowhere.
        ValueError: it is ``teacher``.
    """
    if source == "teacher":
        raise ValueError("data source 'teacher' stands for samples that a distillation draws; here images are needed")
    name = source.removeprefix("hf://").removeprefix("datasets/")
    missing = f"data source {source!r} does not exist; give a parquet file, a folder, or a hub id (owner/name)"
    if not re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", name) or name.endswith(".parquet"):
        raise FileNotFoundError(missing)
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=10)
        reached = True
    except (RepositoryNotFoundError, HFValidationError):
        raise FileNotFoundError(f"{missing}; on the hub there is none by that name, or not for you") from None
    except Exception:  # no network, or HF_HUB_OFFLINE: the hub's client raises many kinds
        reached = False
    datasets.config.HF_HUB_OFFLINE = not reached
    return name


def has_split(source: str, split: str) -> bool:
    """Whether a source that :func:`open_rows` takes has a split of its own by that name; a single file has none."""
    path = ASSETS / "mnist" if source == "mnist" else Path(source)
    if path.is_dir():
        return (path / split).is_dir() or any(path.glob(f"{split}*.parquet"))
    if path.is_file():
        return False
    name = on_hub(source)
    with one_sentence(source, split):
        return split in datasets.get_dataset_split_names(name)


def load(builder: str, source: str, **kwargs) -> datasets.Dataset:
    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else it calls home for every file on this disk
    with one_sentence(source, kwargs["split"]):
        return datasets.load_dataset(builder, **kwargs)


@contextmanager
def one_sentence(source: str, split: str):
    """Errors of ``datasets`` as a ``FileNotFoundError`` or ``ValueError`` that says which data and why."""
    try:
        yield
    except ConnectionError as error:
        reason = "it is neither on disk nor in the cache, and the hub cannot be reached"
        raise FileNotFoundError(f"data source {source!r} does not exist: {reason}") from error
    except Exception as error:  # datasets raises many kinds; the user needs the source and the reason
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"data source {source!r}, split {split!r}, cannot be loaded: {reason}") from error


def load_images(config: DataConfig, channels: int) -> Images:
    """The images a recipe names, decoded lazily.

    Raises:
        ValueError: a column that the data does not have, one without images, or a number of channels images never have.
    """
    if channels not in MODES:
        raise ValueError(f"data source {config.source!r} is read as images of 1 or 3 channels, sample_shape has {channels}")
    rows = open_rows(config.source, config.split)
    for column in filter(None, (config.image_column, config.label_column)):
        if column not in rows.column_names:
            have = ", ".join(rows.column_names)
            raise ValueError(f"data source {config.source!r} has no column {column!r}; it has: {have}")
    if not isinstance(rows.features[config.image_column], datasets.Image):
        raise ValueError(f"column {config.image_column!r} of data source {config.source!r} holds no images")
    if not len(rows):
        raise ValueError(f"data source {config.source!r} holds no images")
    path = Path(config.source)
    if path.is_file() or any(path.glob(f"{config.split}*.parquet")):
        check_embedded(rows, config)
    return Images(rows, config.image_column, config.label_column, channels)


def check_embedded(rows: datasets.Dataset, config: DataConfig) -> None:
    """Raise ``ValueError`` for a parquet file that does not hold its images, but names files or addresses to read."""
    chunks = rows.data.column(config.image_column).chunks
    missing = sum(struct_field(chunk, "bytes").null_count for chunk in chunks)
    if missing:
        raise ValueError(
            f"column {config.image_column!r} of data source {config.source!r} lacks {missing} images: a parquet file must "
            "hold them as bytes"
        )


def as_tensors(images: Images) -> tuple[Tensor, Tensor]:
    """All images ``(N, C, H, W)`` float32 in [-1, 1] and labels ``(N,)``, for data that fits in memory."""
    column = images.rows.cast_column(images.image_column, datasets.Image(decode=False)).with_format("arrow")
    encoded = column[:][images.image_column].combine_chunks()
    files = zip(encoded.field("bytes").to_pylist(), encoded.field("path").to_pylist(), strict=True)
    pixels = []
    for index, (data, path) in enumerate(files):
        with images.one_sentence(index):
            image = Image.open(path if data is None else io.BytesIO(data))
            pixels.append(images.pixels(upright(image)))
    labels = image_labels(images)
    if labels is None:
        labels = torch.zeros(len(pixels), dtype=torch.long)
    return torch.from_numpy(np.stack(pixels)).float().div_(127.5).sub_(1), labels


def upright(image: Image.Image) -> Image.Image:
    """As ``datasets`` decodes it: turned as its EXIF data say. One that is not turned is not decoded yet."""
    return ImageOps.exif_transpose(image) if image.getexif().get(ExifTags.Base.Orientation) is not None else image


def image_labels(images: Images) -> Tensor | None:
    """The label of every image ``(N,)``; ``None`` for data that are read without.

    Raises:
        ValueError: an image without a label, or labels that are no integers.
    """
    if images.label_column is None:
        return None
    labels = images.rows[images.label_column][:]
    if None in labels:
        raise ValueError(f"column {images.label_column!r} has images without a label; set label_column to null")
    if not np.issubdtype(np.asarray(labels).dtype, np.integer):
        raise ValueError(f"column {images.label_column!r} must hold integer labels")
    return torch.tensor(labels)


# Below this many values a data set is decoded once and kept in memory: a training step then costs no decoding.
IN_MEMORY_VALUES = 200_000_000


class Captioned(Dataset):
    """Images or latents with a prompt each in place of a label, as a mapping of tensors.

    Prompts of a data set belong to its rows; those of samples of a teacher are the ones that it drew them for.

    Raises:
        ValueError: a data set of another number of rows.
    """

    def __init__(self, images: Dataset, prompts: Prompts, recipe: Recipe):
        self.images, self.prompts = images, prompts
        if recipe.data.source != "teacher" and len(images) != len(prompts):
            raise ValueError(
                f"data.prompts {recipe.data.prompts!r} holds {len(prompts)} prompts, data source {recipe.data.source!r} "
                f"{len(images)} images; there must be one prompt for each, in their order"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.images[index][0], self.prompts.row(index)


def captioned(data: Dataset, prompts: Prompts | None, recipe: Recipe) -> Dataset:
    return data if prompts is None else Captioned(data, prompts, recipe)


def collate(items: list[tuple]) -> tuple[Tensor, Condition]:
    """A batch of a training set's items: samples, and their labels or prompts."""
    x0, labels = default_collate(items)
    return x0, Embeddings(labels) if isinstance(labels, dict) else labels


def recipe_prompts(recipe: Recipe) -> Prompts | None:
    """The prompts that a recipe names, checked against what their manifest says of them.

    Raises:
        FileNotFoundError, ValueError: see :class:`distill.prompts.Prompts`.
    """
    return None if recipe.data.prompts is None else Prompts(recipe.data.prompts)


def training_data(recipe: Recipe, teacher: Teacher | None, cache: Path, prompts: Prompts | None = None) -> Dataset:
    """The training set of a recipe, checked against it: in memory if it is small.

    Args:
        teacher: draws the samples of ``data.source: teacher``.
        prompts: the recipe's.

    Raises:
        ValueError: a sample shape, label, sigma_data or number of prompts that does not fit the recipe.
    """
    if recipe.data.source == "teacher":
        return captioned(TensorDataset(*teacher_samples(teacher, recipe, cache, prompts)), prompts, recipe)
    data = stored_data(recipe)
    if isinstance(data, Images) and len(data) * math.prod(recipe.sample_shape) <= IN_MEMORY_VALUES:
        data = TensorDataset(*as_tensors(data))
    check_sigma_data(data, recipe)
    return captioned(data, prompts, recipe)


def stored_data(recipe: Recipe) -> Images | Latents:
    """The images or latents on disk that a recipe trains on, with shape and labels checked.

    Raises:
        FileNotFoundError, ValueError: what is missing, damaged or does not fit the recipe.
    """
    return training_latents(recipe) if is_latents_folder(recipe.data.source) else training_images(recipe)


def training_latents(recipe: Recipe) -> Latents:
    """The cached latents a recipe trains on; see :func:`stored_data`."""
    latents = Latents(recipe.data.source, recipe.seed)
    if len(recipe.sample_shape) == 4:  # of a network of videos, to which images are such of one frame
        latents.as_videos()
    where = f"data source {recipe.data.source!r}"
    if latents.shape != recipe.sample_shape:
        raise ValueError(f"latents of {where} have shape {latents.shape}, the recipe wants {recipe.sample_shape}")
    if recipe.num_classes is not None and not latents.labelled:
        raise ValueError(f"{where} holds latents without labels, the recipe has {recipe.num_classes} classes")
    if recipe.num_classes is not None:
        check_label_range(latents.labels, recipe.num_classes, where)
    return latents


def training_images(recipe: Recipe) -> Images:
    """The images a recipe trains on, with shape and labels checked.

    Raises:
        ValueError: what does not fit the recipe.
    """
    images = load_images(recipe.data, recipe.sample_shape[0])
    shape = list(images[0][0].shape)
    if shape != recipe.sample_shape:
        raise ValueError(f"images of {recipe.data.source!r} have shape {shape}, the recipe wants {recipe.sample_shape}")
    check_data_labels(images, recipe)
    return images


def check_sigma_data(images: Dataset, recipe: Recipe) -> None:
    """Compare the recipe's sigma_data with the data's standard deviation (over up to 2,000 images)."""
    indices = torch.linspace(0, len(images) - 1, min(len(images), 2_000)).long()
    values = torch.stack([images[int(i)][0] for i in indices])
    measured = values.double().std().item()
    if abs(measured - recipe.sigma_data) > SIGMA_DATA_TOLERANCE * recipe.sigma_data:
        raise ValueError(
            f"sigma_data is {recipe.sigma_data} in the recipe but {measured:.4f} measured on {recipe.data.source!r}; "
            f"they may differ by {SIGMA_DATA_TOLERANCE:.0%} at most"
        )


def check_data_labels(images: Images, recipe: Recipe) -> None:
    """Raise ``ValueError`` unless a class-conditional recipe's data have a label for every image, all of them classes."""
    if recipe.num_classes is None:
        return
    where = f"data source {recipe.data.source!r}"
    if images.label_column is None:
        raise ValueError(f"{where} is read without labels (data.label_column), the recipe has {recipe.num_classes} classes")
    labels = np.asarray(images.rows[images.label_column][:])
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"column {images.label_column!r} of {where} must hold integer labels")
    check_label_range(labels, recipe.num_classes, where)


def check_label_range(labels: Tensor | np.ndarray, num_classes: int, where: str) -> None:
    for label in (labels.min(), labels.max()):
        if not 0 <= label < num_classes:
            raise ValueError(f"label {label} in {where} is out of range for num_classes {num_classes}")


def teacher_samples(
    teacher: Teacher, recipe: Recipe, cache: Path, prompts: Prompts | None = None
) -> tuple[Tensor, Tensor]:
    """Samples of the teacher in place of a data set, drawn once and cached under ``cache``, and their labels (0 if there are
    none).

    The file's name is a hash of the teacher's weights and of everything else the samples depend on.
    """
    config = recipe.data
    guidance = [teacher.guidance_scale, teacher.guidance_interval]
    if teacher.guidance_teacher is not None:
        guidance.append(teacher.guidance_teacher.metadata())
    facts = [config.num_teacher_samples, config.teacher_steps, recipe.seed, guidance, teacher.metadata()]
    if prompts is not None:
        facts.append(prompts.digest())
    path = cache / f"teacher-samples-{model_hash(teacher, facts)[:16]}.safetensors"
    if not path.exists():
        draw_teacher_samples(teacher, recipe, path, prompts)
    tensors, key = read_safetensors(path), "latents" if teacher.latents else "images"
    shapes = {"labels": [config.num_teacher_samples], key: [config.num_teacher_samples, *teacher.sample_shape]}
    if {name: list(tensor.shape) for name, tensor in tensors.items()} != shapes:
        raise ValueError(f"{path} does not hold the samples of this recipe (damaged or changed); delete it")
    samples = tensors[key].float()
    return samples if teacher.latents else samples / 127.5 - 1, tensors["labels"].long()


def draw_teacher_samples(teacher: Teacher, recipe: Recipe, path: Path, prompts: Prompts | None) -> None:
    """Images are kept in 8 bits, latents in half precision."""
    config = recipe.data
    batches = generate(
        teacher, config.num_teacher_samples, num_inference_steps=config.teacher_steps, role="teacher", seed=recipe.seed,
        labels=prompts, batch_size=recipe.evaluation.batch_size,
    )  # fmt: skip
    samples, labels = [], []
    with tqdm(total=config.num_teacher_samples, desc="teacher samples", unit="image") as bar:
        for x, y in batches:
            kept = x.half() if teacher.latents else ((x + 1) * 127.5).round().to(torch.uint8)
            samples.append(kept.cpu())
            labels.append(y.cpu() if torch.is_tensor(y) else torch.zeros(len(x), dtype=torch.long))
            bar.update(len(x))
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"latents" if teacher.latents else "images": torch.cat(samples), "labels": torch.cat(labels)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary))


class StepSampler:
    """Batches of indices as a function of the step alone, so that a resumed run sees the data it would have seen.

    Every process takes its share of a batch of ``batch_size``, in the order of the processes; each index appears once an
    epoch, however many processes there are. The last incomplete batch of an epoch is dropped.

    Raises:
        ValueError: fewer images than one batch.
    """

    def __init__(self, size: int, batch_size: int, seed: int, start: int, stop: int, rank: int = 0, world: int = 1):
        if size < batch_size:
            raise ValueError(f"{size} images are fewer than one batch of {batch_size}")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.per_epoch = size // batch_size
        self.start, self.stop, self.rank, self.world = start, stop, rank, world

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = None, None
        for step in range(self.start, self.stop):
            if epoch != step // self.per_epoch:
                epoch = step // self.per_epoch
                order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed + epoch))
            share = self.batch_size // self.world
            first = (step % self.per_epoch) * self.batch_size + self.rank * share
            yield order[first : first + share].tolist()


def training_loader(data: Dataset, sampler: StepSampler, num_workers: int) -> DataLoader | Iterator:
    """Batches ``(x0, labels)``, or ``(x0, Embeddings)``; data in memory without prompts is indexed directly."""
    if isinstance(data, TensorDataset):
        return ((data.tensors[0][i], data.tensors[1][i]) for i in sampler)
    stored = data.images if isinstance(data, Captioned) else data
    batches = counting_on(sampler) if isinstance(stored, Latents) else sampler
    return DataLoader(
        data, batch_sampler=batches, num_workers=num_workers, persistent_workers=num_workers > 0, collate_fn=collate
    )


def counting_on(sampler: StepSampler) -> Iterator[list[int]]:
    """A sampler's batches with indices that count on from one epoch to the next, as :class:`Latents` takes them."""
    for step, batch in enumerate(sampler, sampler.start):
        first = step // sampler.per_epoch * sampler.size
        yield [first + i for i in batch]
