"""A diffusers pipeline for consistency models. Exported folders carry this file and all it needs."""

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin, SCMScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from distill.schedule import check_times, sample_seeds, student_times
from teachers.base import Teacher
from teachers.networks import build
from teachers.parameterization import Parameterization


class SCMNetwork(ModelMixin, ConfigMixin):
    """A TrigFlow network as a diffusers model; its arguments are the keys of a model's ``config.json``."""

    @register_to_config
    def __init__(
        self, network: str, network_config: dict, parameterization: dict, sigma_data: float, sample_shape: list[int],
        num_classes: int | None = None, label_format: str = "index", format: str = "scm-distill", version: int = 1,
        role: str = "student", sampling: dict | None = None, guidance_scale: float | None = None,
        guidance_range: list[float] | None = None, teacher: str | None = None, training: dict | None = None,
    ):  # fmt: skip
        super().__init__()
        native = build(network, network_config)
        convention = Parameterization(**parameterization)
        self.model = Teacher(native, convention, sigma_data, tuple(sample_shape), num_classes, label_format)

    def forward(self, x_t, t, labels=None, guidance=None):
        """``F(x_t, t)``, see :class:`teachers.Teacher`."""
        return self.model(x_t, t, labels, guidance)


class SCMPipeline(DiffusionPipeline):
    """Few-step sampling from a continuous-time consistency model (sCM, arXiv 2410.11081).

    Args:
        network: an :class:`SCMNetwork`.
        scheduler: diffusers' ``SCMScheduler``; with explicit times its step is multistep consistency sampling exactly.
    """

    def __init__(self, network: SCMNetwork, scheduler: SCMScheduler):
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler)

    @classmethod
    def from_pretrained(cls, folder, dtype: torch.dtype = torch.float32) -> "SCMPipeline":
        """Load an exported folder with the installed package's code; nothing in the folder is executed."""
        network = SCMNetwork.from_pretrained(folder, subfolder="network", dtype=dtype)
        return cls(network.eval(), SCMScheduler.from_pretrained(folder, subfolder="scheduler"))

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: int | list[int] | None = None,
        num_inference_steps: int = 2,
        timesteps: list[float] | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ):
        """Images.

        Args:
            batch_size: number of images; by default one per label, or 1.
            class_labels: one class, or one per image; by default they cycle through the classes.
            num_inference_steps: network evaluations, 1 to 8.
            timesteps: sampling times in radians, decreasing, in place of the defaults.
            guidance_scale: only for a network that takes the guidance scale as an input.
            generator: one generator seeds every image on its own, so that image i does not depend on the batch size;
                a list gives image i its generator.
            output_type: ``pil``, ``np`` ``(N, H, W, C)`` in [0, 1], or ``pt`` ``(N, C, H, W)`` in [0, 1].

        Raises:
            ValueError: an argument that is not allowed, with what is.
        """
        config = self.network.config
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type is {output_type!r}; allowed: pil, np, pt")
        if guidance_scale is not None and not self.network.model.accepts_guidance:
            raise ValueError(f"this student was distilled at guidance scale {config.guidance_scale}; it takes no other")
        labels = self.prepare_labels(class_labels, batch_size)
        num = len(labels) if labels is not None else batch_size or 1
        generators = self.prepare_generators(generator, num)
        times = self.prepare_times(num_inference_steps, timesteps)
        guidance = None
        if guidance_scale is not None:
            guidance = torch.full((num,), float(guidance_scale), device=self._execution_device)

        sigma_data, dtype = config.sigma_data, self.network.dtype
        noise = [torch.randn(tuple(config.sample_shape), generator=g) for g in generators]
        sample = sigma_data * torch.stack(noise).to(self._execution_device)
        self.scheduler.set_timesteps(
            len(times), timesteps=[*times, 0.0], max_timesteps=None, intermediate_timesteps=None,
            device=self._execution_device,
        )  # fmt: skip
        for t in self.progress_bar(self.scheduler.timesteps[:-1]):
            F = self.network(sample.to(dtype), t.expand(num), labels, guidance).float()
            sample, denoised = self.scheduler.step(
                sigma_data * F, t, sample, generator=generators, return_dict=False
            )
        images = self.postprocess(denoised, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def prepare_labels(self, class_labels, batch_size) -> torch.Tensor | None:
        classes = self.network.config.num_classes
        if classes is None:
            if class_labels is not None:
                raise ValueError("this model is unconditional and takes no class_labels")
            return None
        if class_labels is None:
            class_labels = [i % classes for i in range(batch_size or 1)]
        labels = [class_labels] * (batch_size or 1) if isinstance(class_labels, int) else list(class_labels)
        if batch_size is not None and len(labels) != batch_size:
            raise ValueError(f"batch_size {batch_size} needs as many class_labels, got {len(labels)}")
        bad = [label for label in labels if not 0 <= label < classes]
        if bad:
            raise ValueError(f"label {bad[0]} is out of range: this model has classes 0 to {classes - 1}")
        return torch.tensor(labels, device=self._execution_device)

    @staticmethod
    def prepare_generators(generator, num: int) -> list[torch.Generator]:
        if isinstance(generator, list):
            if len(generator) != num:
                raise ValueError(f"{num} images need {num} generators, got {len(generator)}")
            return generator
        if generator is None:
            generator = torch.Generator().manual_seed(torch.seed())
        return [torch.Generator().manual_seed(seed) for seed in sample_seeds(num, generator)]

    def prepare_times(self, num_inference_steps: int, timesteps: list[float] | None) -> list[float]:
        config = self.network.config
        if timesteps is not None:
            check_times(list(timesteps))
            return list(timesteps)
        stored = (config.sampling or {}).get(str(num_inference_steps))
        return stored or student_times(num_inference_steps, config.sigma_data)

    @staticmethod
    def postprocess(samples: torch.Tensor, output_type: str):
        images = (samples.clamp(-1, 1) + 1) / 2
        if output_type == "pt":
            return images
        images = images.cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "np":
            return images
        from PIL import Image

        pixels = (images * 255).round().astype("uint8")
        return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]
