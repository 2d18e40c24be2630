"""What ``distill.from_pretrained`` returns: a teacher to distil, or a student, with everything one does to it."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import teachers
from distill.device import chosen_device
from distill.latents import Decoder
from distill.prompts import Prompts
from distill.recipe import MINIMUM_SAMPLES, load_recipe
from distill.sampling import device_of, generate
from distill.schedule import student_times
from teachers import Teacher
from teachers.condition import Condition
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

        if "teacher" in overrides:
            raise ValueError("teacher cannot be overridden: it is the model that is trained here; load another one")
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
        labels: list[int] | Condition | None = None,
        seed: int = 0,
        guidance_scale: float | None = None,
        batch_size: int = 250,
        progress: bool = False,
        solver: str = "heun",
        guidance_teacher: str | Path | Teacher | None = None,
        prompts: str | Path | Prompts | None = None,
        vae: str | Path | Decoder | None = None,
        normalization: str = "vae",
        mixed_precision: str = "no",
        intermediate_times: list[float] | None = None,
    ) -> Tensor:
        """``(num, C, H, W)`` fp32 on the CPU: images in [-1, 1]; of a model of latents, without a ``vae``, latents as they
        are. Image ``i`` depends on ``seed`` and ``i`` only, not on the batch size.

        Args:
            num_inference_steps: evaluations of a student (default 2), Heun steps of a teacher (default 18: 35
                evaluations).
            labels: one class per image; by default they cycle through the classes. For a model of texts, the
                ``teachers.condition.Embeddings`` of one prompt per image.
            guidance_scale: guidance of a teacher, or the input of a student distilled over a range (by default the
                lowest of it).
            progress: show a progress bar on stderr.
            solver: of a teacher: ``heun``, or ``dpmpp_2m`` with one evaluation a step.
            guidance_teacher: the network that a teacher is guided away from, in place of its own null class: a name, a
                path or a ``Teacher``, which is moved to this one's device.
            prompts: in place of ``labels``, a folder of ``distill precompute prompts``: row ``i`` for image ``i``, from its
                start again after its end. Its null prompt is what a teacher is guided away from.
            vae: a folder with the autoencoder of diffusers that decodes latents, of one frame if they are videos.
            normalization: of these latents, as in ``distill precompute latents``: edm2, scm, sd, or vae, which is what the
                autoencoder's config says.
            mixed_precision: ``bf16`` to evaluate the network in it, for devices that have bf16 units.
            intermediate_times: of a student, its sampling times after ``t_max`` in radians, one fewer than steps; by
                default its own, or :data:`distill.schedule.INTERMEDIATE_TIMES`.

        Raises:
            FileNotFoundError, ValueError: bad numbers of steps, times, labels, prompts or guidance, or a bad autoencoder.
        """
        batches = self.generate(
            num, num_inference_steps, labels, seed, guidance_scale, batch_size, progress, solver, guidance_teacher,
            prompts, vae, normalization, mixed_precision, intermediate_times,
        )  # fmt: skip
        return torch.cat([images.cpu() for images, _ in batches])

    def guidance(self, scale: float | None) -> float | None:
        """``scale`` checked against what this model was distilled at, or its default."""
        if self.role == "teacher":
            return scale
        if not self.network.accepts_guidance:
            fixed = self.config.get("guidance_scale", 1.0)
            if scale not in (None, fixed):
                raise ValueError(f"this student was distilled at the fixed guidance scale {fixed:g}, got {scale}")
            return None
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
        device = device_of(self.network)
        guide = load_guidance_teacher(guidance_teacher, device).to(device).at_sigma_data(self.network.sigma_data)
        return self.network.guided_by(scale, self.network.guidance_interval, guide)

    def generate(
        self, num, num_inference_steps=None, labels=None, seed=0, guidance_scale=None, batch_size=250, progress=False,
        solver="heun", guidance_teacher=None, prompts=None, vae=None, normalization="vae", mixed_precision="no",
        intermediate_times=None,
    ) -> Iterator[tuple[Tensor, Condition | None]]:  # fmt: skip
        """:meth:`sample` as an iterator over batches of images and labels. Arguments are checked before the first one."""
        decoder = None if vae is None else self.decoder(vae, normalization)
        steps = self.number_of_steps(num_inference_steps, intermediate_times)
        times = self.sampling_times(steps, intermediate_times)
        network = self.guided(guidance_scale, guidance_teacher)
        if prompts is not None:
            network, labels = self.prompted(network, prompts, labels)
        batches = generate(
            network, num, num_inference_steps=steps, role=self.role, labels=labels, seed=seed,
            batch_size=batch_size, times=times, guidance=self.guidance(guidance_scale), solver=solver,
            mixed_precision=mixed_precision,
        )  # fmt: skip
        progress_bar = {"total": num, "desc": f"{self.role}, {steps} steps", "unit": "image", "disable": not progress}
        return self.decoded(batches, decoder, progress_bar)

    def number_of_steps(self, num_inference_steps: int | None, intermediate_times: list[float] | None) -> int:
        """What was asked for, or one more than the times, or the default.

        Raises:
            ValueError: times that are no list of numbers.
        """
        if num_inference_steps is None and intermediate_times is not None:
            return len(numbers(intermediate_times)) + 1
        return DEFAULT_STEPS[self.role] if num_inference_steps is None else num_inference_steps

    def sampling_times(self, num_inference_steps: int, intermediate_times: list[float] | None) -> list[float] | None:
        """A student's times in radians, ``t_max`` first: those asked for, or its own; ``None`` for the defaults.

        Raises:
            ValueError: times for a teacher, or that do not decrease or do not fit the number of steps.
        """
        if intermediate_times is None:
            return self.config.get("sampling", {}).get(str(num_inference_steps))
        if self.role == "teacher":
            raise ValueError("intermediate_times are a student's; a teacher has a solver")
        return student_times(num_inference_steps, self.network.sigma_data, numbers(intermediate_times))

    @staticmethod
    def decoded(batches: Iterator, decoder: Decoder | None, progress_bar: dict) -> Iterator[tuple[Tensor, Condition | None]]:
        """The batches as images, with a progress bar of tqdm's arguments ``progress_bar``."""
        with tqdm(**progress_bar) as bar:
            for images, used in batches:
                yield (images if decoder is None else decoder(images)), used
                bar.update(len(images))

    @staticmethod
    def prompted(network: Teacher, prompts: str | Path | Prompts, labels) -> tuple[Teacher, Prompts]:
        """The network with the prompts' null prompt, and the prompts."""
        if labels is not None:
            raise ValueError("give either labels or prompts, not both")
        prompts = prompts if isinstance(prompts, Prompts) else Prompts(prompts)
        return network.twin(null_prompt=prompts.null), prompts

    def decoder(self, vae: str | Path | Decoder, normalization: str) -> Decoder:
        """What makes images of this model's latents."""
        if isinstance(vae, Decoder):
            return vae
        if not self.network.latents:
            raise ValueError(f"the samples of this model are images already, of {self.network.sample_shape}; leave vae out")
        decoder = Decoder(vae, normalization, self.network.sample_shape)
        decoder.vae.to(device_of(self.network))
        return decoder

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
        prompts: str | Path | Prompts | None = None,
        vae: str | Path | None = None,
        normalization: str = "vae",
        batch_size: int = 250,
        solver: str = "heun",
        mixed_precision: str = "no",
        intermediate_times: list[float] | None = None,
    ) -> dict:
        """Scores of ``num`` samples against ``data``, with the real-against-real floor; see ``distill.evaluation``.

        ``features`` are by default those of the MNIST classifier for MNIST, else pooled pixels; guidance, solver, prompts,
        precision, times and autoencoder are those of :meth:`sample`. Samples of a model of latents are scored once decoded;
        how well they follow their prompts is not measured.

        Raises:
            FileNotFoundError, ValueError: as :meth:`sample`; fewer than 50 samples; latents without an autoencoder.
        """
        from distill.evaluation import build_reference, evaluate

        if num < MINIMUM_SAMPLES:
            raise ValueError(f"metrics need at least {MINIMUM_SAMPLES} samples, got {num}")
        if self.network.latents and vae is None:
            raise ValueError("the samples of this model are latents; scores are of images and need its autoencoder (vae)")
        decoder = None if vae is None else self.decoder(vae, normalization)
        channels = self.network.sample_shape[0] if decoder is None else decoder.image_channels
        label_column = "label" if self.network.text_condition is None else None
        batches = self.generate(
            num, num_inference_steps, seed=seed, progress=progress, guidance_scale=guidance_scale,
            guidance_teacher=guidance_teacher, prompts=prompts, vae=decoder, batch_size=batch_size,
            solver=solver, mixed_precision=mixed_precision, intermediate_times=intermediate_times,
        )  # fmt: skip
        # What is asked of the model has been checked by now; nothing has been drawn yet.
        reference = build_reference(data, features, channels, label_column=label_column)
        return evaluate(batches, reference)

    def export(
        self, folder: str | Path, format: str = "scm", vae: str | Path | None = None, pipeline: str | Path | None = None,
        normalization: str | None = None,
    ) -> Path:  # fmt: skip
        """Write a diffusers pipeline folder, or adapters for one; see :func:`distill.export.export`."""
        from distill.export import export  # diffusers is slow to import, and sampling does not need it

        return export(self.network, folder, self.config, format, vae, pipeline, normalization)


def numbers(values) -> list[float]:
    """A list of plain numbers.

    Raises:
        ValueError: anything else.
    """
    if isinstance(values, list | tuple) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return list(values)
    raise ValueError(f"intermediate_times must be a list of numbers, got {values!r}")


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


def from_pretrained(source: str | Path | Teacher, device: str | torch.device | None = None) -> Model:
    """A model by whatever :func:`teachers.load` takes: a name, a path, ``hf://owner/name``, or a ``teachers.Teacher``.

    Args:
        device: where it computes; by default on a GPU if there is one. A ``Teacher`` in memory stays where it is.

    Raises:
        FileNotFoundError, ValueError: see :func:`teachers.load`; or a device that is not there.
    """
    if isinstance(source, Teacher):
        known = is_registered(source.native)
        return Model(source, model_config(source, "teacher") if known else {"role": "teacher", **source.metadata()})
    return Model(teachers.load(source, chosen_device(device)), teachers.load_config(source))
