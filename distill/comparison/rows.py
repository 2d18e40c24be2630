"""Rows of the report: points that differ only in their seeds, and what of a row differs from its teacher."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from distill.comparison.entries import ImagesEntry, ModelEntry, Point
from distill.comparison.scores import combine, outside
from teachers.pretrained import read_safetensors


@dataclass(frozen=True)
class Row:
    """Points of several seeds and what was found, seed by seed; ``samples_path`` holds the images of the first."""

    points: list[Point]
    results: list[dict]
    samples_path: Path

    @property
    def entry(self) -> ModelEntry | ImagesEntry:
        return self.points[0].entry

    @property
    def steps(self) -> int | None:
        return self.points[0].steps

    @property
    def guidance(self) -> float | None:
        return self.points[0].guidance

    @property
    def nfe(self) -> int | None:
        return self.points[0].nfe

    @property
    def num_samples(self) -> int:
        return self.points[0].num

    @property
    def ms_per_image(self) -> float | None:
        times = [r["ms_per_image"] for r in self.results if r["ms_per_image"] is not None]
        return sum(times) / len(times) if times else None

    @property
    def line(self) -> str:
        """The model and its steps: the same at every guidance scale."""
        return self.entry.name if self.steps is None else f"{self.entry.name}, {self.steps} step{'s' * (self.steps > 1)}"

    @property
    def said(self) -> str:
        """The same inside a sentence."""
        return self.line.replace(f"{self.entry.name}, ", f"{self.entry.name} in ", 1)

    @cached_property
    def scores(self) -> dict[str, dict]:
        return combine(self.results)

    @cached_property
    def images(self) -> dict[str, Tensor]:
        """Of the first seed: ``grid`` and ``pairs`` ``(N, H, W, C)`` in 8 bits, and which samples they are."""
        return {key: value for key, value in read_safetensors(self.samples_path).items() if key != "features"}

    def plain(self) -> dict:
        """As JSON."""
        return {
            "model": self.entry.name, "role": self.entry.role, "source": str(self.entry.source), "steps": self.steps,
            "guidance_scale": self.guidance, "network_evaluations": self.nfe, "ms_per_image": self.ms_per_image,
            "num_samples": self.num_samples, "seeds": [p.seed for p in self.points if p.seed is not None],
            "scores": self.scores, "points": [r["samples"] for r in self.results],
            "nearest_pairs": self.nearest_pairs,
        }  # fmt: skip

    @property
    def nearest_pairs(self) -> list[dict]:
        indices = self.images["pair_indices"].view(-1, 2).tolist()
        return [
            {"distance": distance, "samples": pair}
            for distance, pair in zip(self.images["pair_distances"].tolist(), indices, strict=True)
        ]


def baseline(row: Row, rows: list[Row]) -> Row | None:
    """The row that a row is compared with: its teacher, or if that is not there the first one, at the same guidance scale
    and with the most evaluations; ``None`` for a teacher's own rows.
    """
    teachers = [r for r in rows if r.entry.role == "teacher" and (row.guidance is None or r.guidance == row.guidance)]
    if row.entry.role in ("teacher", "real") or not teachers:
        return None
    wanted = getattr(row.entry, "config", {}).get("teacher")
    own = [r for r in teachers if r.entry.source == wanted] or [r for r in teachers if r.entry is teachers[0].entry]
    return max(own, key=lambda r: (-r.guidance, r.nfe))  # images have no scale: the lowest


def differences(row: Row, other: Row | None) -> dict[str, int]:
    """Of each score that has an interval in both rows: 1 or -1 if it lies above or below the other one's, outside both."""
    if other is None:
        return {}
    both = {key: (score, other.scores[key]) for key, score in row.scores.items() if key in other.scores}
    return {key: outside(*pair) for key, pair in both.items() if all(score["interval"] for score in pair)}
