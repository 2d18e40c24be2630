"""What ``distill.from_pretrained`` returns: a teacher to distil, or a student, with everything one does to it."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import teachers
from distill.export import export
from distill.recipe import load_recipe
from distill.sampling import device_of, generate
from teachers import Teacher
from teachers.networks import is_registered
from teachers.pretrained import model_config

DEFAULT_STEPS = {"teacher": 18, "student": 2}


class Model:
    """A pretrained network with its role.

    Args:
        network: the TrigFlow network.
        config: its ``config.json``; for a network that is not on disk, what is known of it.

    ``role`` is ``"teacher"`` (samples by solving the PF-ODE) or ``"student"`` (samples in a few evaluations).
    """

    def __init__(self, network: Teacher, config: dict):
        self.network, self.config = network, config

    @property
    def role(self) -> str:
        return self.config["role"]

    def train(self, recipe: str | Path, **overrides) -> "Model":
        """Distil this model's network by a recipe; afterwards this object is the student.

        Args:
            recipe: a YAML file, or the name of one that ships with the package.
            overrides: recipe values by key (``max_train_steps=200``); dots are written as ``__``
                (``optimizer__learning_rate=1e-4``).

        Raises:
            ValueError: a bad recipe, one that does not fit this network, or distillation from a student.
        """
        from distill.run import run  # the trainer is slow to import, and sampling does not need it

        values = {key.replace("__", "."): value for key, value in overrides.items()}
        parsed = load_recipe(recipe, {**values, "teacher": self.network.source or "in memory"})
        if parsed.needs_velocity and self.role == "student":
            raise ValueError(has_no_velocity(parsed.teacher))
        trained = run(parsed, self.network)
        self.network, self.config = trained.network, trained.config
        return self

    def sample(
        self,
        num: int,
        num_inference_steps: int | None = None,
        labels: list[int] | Tensor | None = None,
        seed: int = 0,
        guidance_scale: float | None = None,
        batch_size: int = 250,
        progress: bool = False,
        solver: str = "heun",
        guidance_teacher: str | Path | Teacher | None = None,
    ) -> Tensor:
        """``(num, C, H, W)`` fp32 in [-1, 1]. Image ``i`` depends on ``seed`` and ``i`` only, not on the batch size.

        Args:
            num_inference_steps: evaluations of a student (default 2), Heun steps of a teacher (default 18: 35
                evaluations).
            labels: one class per image; by default they cycle through the classes.
            guidance_scale: guidance of a teacher, or the input of a student distilled over a range (by default the
                lowest of it).
            progress: show a progress bar on stderr.
            solver: of a teacher: ``heun``, or ``dpmpp_2m`` with one evaluation a step.
            guidance_teacher: the network that a teacher is guided away from, in place of its own null class: a name, a
                path or a ``Teacher``.

        Raises:
            ValueError: bad numbers of steps, labels or guidance.
        """
        batches = self.generate(
            num, num_inference_steps, labels, seed, guidance_scale, batch_size, progress, solver, guidance_teacher
        )
        return torch.cat([images for images, _ in batches])

    def guidance(self, scale: float | None) -> float | None:
        """``scale`` checked against what this model was distilled at, or its default."""
        if self.role == "teacher" or not self.network.accepts_guidance:
            return scale
        low, high = self.config.get("guidance_range") or (1.0, float("inf"))
        scale = low if scale is None else scale
        if not low <= scale <= high:
            raise ValueError(f"this student takes a guidance_scale from {low} to {high}, got {scale}")
        return scale

    def guided(self, scale: float | None, guidance_teacher: str | Path | Teacher | None) -> Teacher:
        """The network, with a guidance teacher if one is given."""
        if guidance_teacher is None:
            return self.network
        if self.role == "student":
            raise ValueError("guidance_teacher is for a teacher; a student has its guidance built in or as an input")
        if scale is None:
            raise ValueError("guidance_teacher needs a guidance_scale")
        guide = load_guidance_teacher(guidance_teacher, device_of(self.network)).at_sigma_data(self.network.sigma_data)
        return self.network.guided_by(scale, self.network.guidance_interval, guide)

    def generate(
        self, num, num_inference_steps=None, labels=None, seed=0, guidance_scale=None, batch_size=250, progress=False,
        solver="heun", guidance_teacher=None,
    ) -> Iterator[tuple[Tensor, Tensor | None]]:  # fmt: skip
        """:meth:`sample` as an iterator over batches of images and labels."""
        steps = DEFAULT_STEPS[self.role] if num_inference_steps is None else num_inference_steps
        times = self.config.get("sampling", {}).get(str(steps))
        network = self.guided(guidance_scale, guidance_teacher)
        batches = generate(
            network, num, num_inference_steps=steps, role=self.role, labels=labels, seed=seed,
            batch_size=batch_size, times=times, guidance=self.guidance(guidance_scale), solver=solver,
        )  # fmt: skip
        with tqdm(total=num, desc=f"{self.role}, {steps} steps", unit="image", disable=not progress) as bar:
            for images, used in batches:
                yield images, used
                bar.update(len(images))

    def evaluate(
        self,
        num: int = 10_000,
        num_inference_steps: int | None = None,
        features: str | None = None,
        data: str = "mnist",
        seed: int = 0,
        progress: bool = False,
        guidance_scale: float | None = None,
        guidance_teacher: str | Path | Teacher | None = None,
        solver: str = "heun",
    ) -> dict:
        """Scores of ``num`` samples against ``data``, with the real-against-real floor; see ``distill.evaluation``.

        ``features`` are by default those of the MNIST classifier for MNIST, else pooled pixels; guidance and solver are
        those of :meth:`sample`.
        """
        from distill.evaluation import build_reference, evaluate

        reference = build_reference(data, features, self.network.sample_shape[0])
        batches = self.generate(
            num, num_inference_steps, seed=seed, progress=progress, guidance_scale=guidance_scale, solver=solver,
            guidance_teacher=guidance_teacher,
        )  # fmt: skip
        return evaluate(batches, reference)

    def export(self, folder: str | Path, format: str = "scm", vae: str | Path | None = None) -> Path:
        """Write a diffusers pipeline folder; see :func:`distill.export.export`."""
        return export(self.network, folder, self.config, format, vae)


def has_no_velocity(student: str) -> str:
    """Why a student cannot stand where a teacher must."""
    return f"{student!r} is a student: its network has no PF-ODE velocity to learn from; name its teacher instead"


def load_guidance_teacher(source: str | Path | Teacher, device: str | torch.device = "cpu") -> Teacher:
    """A pretrained network to guide away from, frozen.

    Raises:
        FileNotFoundError, ValueError: see :func:`teachers.load`; or it is a student.
    """
    if isinstance(source, Teacher):
        return source
    if teachers.load_config(source)["role"] == "student":
        raise ValueError(has_no_velocity(str(source)))
    return teachers.load(source, device).requires_grad_(False)


def from_pretrained(source: str | Path | Teacher) -> Model:
    """A model by bundled name, model folder, run folder, exported pipeline, or a ``teachers.Teacher``.

    Raises:
        FileNotFoundError, ValueError: see :func:`teachers.load`.
    """
    if isinstance(source, Teacher):
        known = is_registered(source.native)
        return Model(source, model_config(source, "teacher") if known else {"role": "teacher", **source.metadata()})
    return Model(teachers.load(source), teachers.load_config(source))
