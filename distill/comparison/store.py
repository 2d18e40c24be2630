"""Points of a comparison on the disk: samples are kept as features and a few images, then scored; what is there is not
computed again.

A point lies in ``points/`` as ``DIGEST.safetensors``, the samples, named by a hash of all that they depend on, and
``DIGEST-SCORES.json``, its scores, whose name also depends on what they were scored against.
"""

import json
import os
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from distill.comparison import scores
from distill.comparison.entries import ImagesEntry, Point
from distill.comparison.scores import Samples, Scorer
from distill.evaluation import extract
from distill.evaluation.diversity import near_duplicates
from distill.evaluation.features import FeatureExtractor
from distill.shards import hash_of, tensors_hash
from distill.visual import to_uint8
from teachers.pretrained import read_safetensors, write_atomically

SHOWN_CLASSES, PER_CLASS, PAIRS = 10, 12, 6
UNCLASSED = 24  # images that are shown where there are no classes
SCORING_COST = 3  # of a sample, in evaluations of the network, for the progress bar


@dataclass(frozen=True)
class Store:
    folder: Path
    extractor: FeatureExtractor
    batch_size: int

    def samples_path(self, point: Point) -> Path:
        return self.folder / "points" / f"{point.digest}.safetensors"

    def scores_path(self, point: Point, against: dict) -> Path:
        return self.folder / "points" / f"{point.digest}-{hash_of([against, scores.VERSION])[:12]}.json"

    def samples(self, point: Point, bar: tqdm) -> dict[str, Tensor]:
        """The samples' features and images, drawn if they are not there; ``seconds`` is what each image took."""
        path = self.samples_path(point)
        if path.exists() and (tensors := self.kept_samples(point, path)) is not None:
            return tensors
        tensors, seconds = self.draw(point, bar)
        batch_size = min(self.batch_size, point.num)
        facts = {"facts": json.dumps(point.facts), "seconds": str(seconds), "batch_size": str(batch_size), **setting()}
        facts["sha256"] = tensors_hash(tensors, point.facts)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: save_file(tensors, temporary, facts))
        return tensors

    def kept_samples(self, point: Point, path: Path) -> dict[str, Tensor] | None:
        """What lies there, or ``None`` if it is damaged: then it is drawn anew, and a line says so."""
        try:
            tensors = read_safetensors(path)
            with safe_open(path, "pt") as file:
                sha256 = file.metadata().get("sha256")
        except (ValueError, OSError, SafetensorError):
            tensors, sha256 = {}, None
        names = {"features", "grid", "grid_indices", "pairs", "pair_indices", "pair_distances"}
        whole = names <= tensors.keys() and len(tensors["features"]) == point.num
        if whole and sha256 in (None, tensors_hash(tensors, point.facts)):  # of an earlier version there is none
            return tensors
        tqdm.write(f"{path} is damaged: {point.title} is drawn anew")
        return None

    def draw(self, point: Point, bar: tqdm) -> tuple[dict[str, Tensor], float]:
        """The tensors that are kept, and the seconds an image took (median over batches: a pause does not count)."""
        grid = shown_indices(point)
        features, asked, seen, images, rates, start = [], [], [], [], [], 0
        for batch, labels, seconds in point.entry.draw(point, self.batch_size):
            found, _ = extract(self.extractor, batch, None)
            features.append(found)
            asked += [] if labels is None else [labels]
            seen += [] if self.extractor.classify is None else [self.extractor.classify(batch)]
            images += [batch[i - start] for i in grid if start <= i < start + len(batch)]
            rates.append(seconds / len(batch))
            start += len(batch)
            bar.update(len(batch) * (point.nfe or 1))
        tensors = {"features": torch.cat(features).float().contiguous()}
        tensors |= {"asked": torch.cat(asked).long()} if asked else {}
        tensors |= {"seen": torch.cat(seen).long()} if seen else {}
        if not tensors["features"].isfinite().all():
            raise ValueError(f"samples of {point.title} are not finite: their features contain NaN or infinity")
        pairs = near_duplicates(tensors["features"], PAIRS)
        indices = [i for _, *pair in pairs for i in pair]
        tensors["grid"], tensors["grid_indices"] = to_bytes(torch.stack(images)), torch.tensor(grid)
        tensors["pairs"], tensors["pair_indices"] = to_bytes(point.entry.images_at(point, indices)), torch.tensor(indices)
        tensors["pair_distances"] = torch.tensor([distance for distance, *_ in pairs])
        return tensors, torch.tensor(rates).median().item()

    def result(self, point: Point, scorer: Scorer, against: dict, bar: tqdm) -> dict:
        """The point's scores, computed if they are not there."""
        path = self.scores_path(point, against)
        kept = self.kept_result(point, path) if path.exists() else None
        tensors = self.samples(point, bar)  # which the report shows, also where they were scored before
        if kept is not None:
            return kept
        values, intervals = scorer.score(as_samples(tensors))
        bar.update(point.num * SCORING_COST)
        with safe_open(self.samples_path(point), "pt") as file:
            drawn = {"batch_size": str(min(self.batch_size, point.num)), **file.metadata()}
        result = {
            "title": point.title, "num_samples": point.num, "nfe": point.nfe,
            "ms_per_image": float(drawn["seconds"]) * 1000 if point.nfe else None,
            "scores": values, "intervals": intervals, "drawn": {k: drawn[k] for k in DRAWN},
            "facts": point.facts, "samples": self.samples_path(point).name,
        }  # fmt: skip
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(result, indent=1)))
        return result

    def kept_result(self, point: Point, path: Path) -> dict | None:
        """What lies there, or ``None`` if it is damaged: then it is scored anew, and a line says so."""
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # no JSON, or no text
            result = None
        if is_result(result, point.facts):
            return result
        tqdm.write(f"{path} is damaged: {point.title} is scored anew")
        return None

    def cost(self, point: Point, against: dict) -> int:
        """What is left to do for a point, in evaluations of a network."""
        drawing = 0 if self.samples_path(point).exists() else point.num * (point.nfe or 1)
        return drawing + (0 if self.scores_path(point, against).exists() else point.num * SCORING_COST)


DRAWN = ("batch_size", "hardware", "system", "python", "torch", "scm-distill", "date")  # what the report tells of drawing
RESULT = {"title", "num_samples", "nfe", "ms_per_image", "scores", "intervals", "drawn", "facts", "samples"}


def is_result(result, facts: dict) -> bool:
    """Whether something read from a file is a point's result, as :meth:`Store.result` writes it."""
    if not isinstance(result, dict) or not result.keys() >= RESULT or result["facts"] != json.loads(json.dumps(facts)):
        return False
    scores, drawn = result["scores"], result["drawn"]
    if not (isinstance(scores, dict) and scores and all(isinstance(value, float | int) for value in scores.values())):
        return False
    return isinstance(drawn, dict) and drawn.keys() >= set(DRAWN) and isinstance(result["intervals"], dict)


def to_bytes(images: Tensor) -> Tensor:
    """``(N, H, W, C)`` in 8 bits."""
    return torch.from_numpy(to_uint8(images))


def as_samples(tensors: dict[str, Tensor]) -> Samples:
    return Samples(tensors["features"], tensors.get("asked"), tensors.get("seen"))


def shown_indices(point: Point) -> list[int]:
    """Which samples are shown: the first ones of each class, or without classes the first ones."""
    labels = point.entry.labels(point.num)
    if labels is None:
        most = UNCLASSED if not isinstance(point.entry, ImagesEntry) else SHOWN_CLASSES * PER_CLASS
        return list(range(min(most, point.num)))
    of_class = [(labels == c).nonzero().flatten()[:PER_CLASS].tolist() for c in range(SHOWN_CLASSES)]
    return sorted(i for indices in of_class for i in indices)


def setting() -> dict[str, str]:
    """What a run happens on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return {
        "hardware": f"{device}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}",
        "system": platform.platform(), "python": platform.python_version(), "torch": torch.__version__,
        "scm-distill": package_version(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def package_version() -> str:
    try:
        return version("scm-distill")
    except ImportError:
        return "from a checkout, not installed"


def cpu_name() -> str:
    """As Linux calls it, else as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} CPUs"
