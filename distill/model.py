"""What ``distill.from_pretrained`` returns: a teacher to distil, or a student, with everything one does to it."""

from pathlib import Path

import torch
from torch import Tensor

import teachers
from distill.export import export
from distill.recipe import load_recipe
from distill.sampling import generate
from teachers import Teacher
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
        """
        from distill.run import run  # the trainer is slow to import, and sampling does not need it

        values = {key.replace("__", "."): value for key, value in overrides.items()}
        parsed = load_recipe(recipe, {**values, "teacher": self.network.source or "in memory"})
        run(parsed, None if self.network.source else self.network)
        student = Path(parsed.output_dir) / "student"
        self.network, self.config = teachers.load(student), teachers.load_config(student)
        return self

    def sample(
        self,
        num: int,
        num_inference_steps: int | None = None,
        labels: list[int] | Tensor | None = None,
        seed: int = 0,
        guidance_scale: float | None = None,
        batch_size: int = 250,
    ) -> Tensor:
        """``(num, C, H, W)`` fp32 in [-1, 1]. Image ``i`` depends on ``seed`` and ``i`` only, not on the batch size.

        Args:
            num_inference_steps: evaluations of a student (default 2), Heun steps of a teacher (default 18: 35
                evaluations).
            labels: one class per image; by default they cycle through the classes.
            guidance_scale: classifier-free guidance of a teacher, or the input of a student distilled over a range.

        Raises:
            ValueError: bad numbers of steps, labels or guidance.
        """
        batches = self.generate(num, num_inference_steps, labels, seed, guidance_scale, batch_size)
        return torch.cat([images for images, _ in batches])

    def generate(self, num, num_inference_steps=None, labels=None, seed=0, guidance_scale=None, batch_size=250):
        """:meth:`sample` as an iterator over batches of images and labels."""
        steps = DEFAULT_STEPS[self.role] if num_inference_steps is None else num_inference_steps
        times = self.config.get("sampling", {}).get(str(steps))
        return generate(
            self.network, num, num_inference_steps=steps, role=self.role, labels=labels, seed=seed,
            batch_size=batch_size, times=times, guidance=guidance_scale,
        )  # fmt: skip

    def evaluate(
        self,
        num: int = 10_000,
        num_inference_steps: int | None = None,
        features: str = "MNIST-CNN",
        data: str = "mnist",
        seed: int = 0,
    ) -> dict:
        """Scores of ``num`` samples against ``data``, with the real-against-real floor; see ``distill.evaluation``."""
        from distill.evaluation import build_reference, evaluate

        reference = build_reference(data, features, self.network.sample_shape[0])
        return evaluate(self.generate(num, num_inference_steps, seed=seed), reference)

    def export(self, folder: str | Path) -> Path:
        """Write a diffusers pipeline folder; see :func:`distill.export.export`."""
        return export(self.network, folder, self.config)


def from_pretrained(source: str | Path | Teacher) -> Model:
    """A model by bundled name, model folder, run folder, exported pipeline, or a ``teachers.Teacher``.

    Raises:
        FileNotFoundError, ValueError: see :func:`teachers.load`.
    """
    if isinstance(source, Teacher):
        known = hasattr(source.native, "config")
        return Model(source, model_config(source, "teacher") if known else {"role": "teacher", **source.metadata()})
    return Model(teachers.load(source), teachers.load_config(source))
