"""A diffusers pipeline for consistency models. Exported folders carry this file and all it needs."""

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin, SCMScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image
from torch import Tensor

from distill.autoencoders import autoencoder_class
from distill.normalization import LatentNormalization, decode
from distill.schedule import check_times, sample_seeds, student_times
from teachers.base import Teacher
from teachers.condition import integer_labels
from teachers.networks import build
from teachers.parameterization import Parameterization

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


class SCMNetwork(ModelMixin, ConfigMixin):
    """A TrigFlow network as a diffusers model; its arguments are the keys of a model's ``config.json``."""

    @register_to_config
    def __init__(
        self, network: str, network_config: dict, parameterization: dict, sigma_data: float, sample_shape: list[int],
        num_classes: int | None = None, label_format: str = "index", format: str = "scm-distill", version: int = 1,
        role: str = "student", sampling: dict | None = None, guidance_scale: float | None = None,
        guidance_range: list[float] | None = None, teacher: str | None = None, training: dict | None = None,
        metrics: dict | None = None, latents: bool | None = None,
    ):  # fmt: skip
        super().__init__()
        native = build(network, network_config)
        convention = Parameterization(**parameterization)
        self.model = Teacher(native, convention, sigma_data, tuple(sample_shape), num_classes, label_format, latents=latents)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        """``F(x_t, t)``, see :class:`teachers.Teacher`."""
        return self.model(x_t, t, labels, guidance)


class SCMPipeline(DiffusionPipeline):
    """Few-step sampling from a continuous-time consistency model (sCM, arXiv 2410.11081).

    Args:
        network: an :class:`SCMNetwork`.
        scheduler: diffusers' ``SCMScheduler``; with explicit times its step is multistep consistency sampling exactly.
        vae: of a network of latents: makes images of them.
        normalization: of these latents: ``image_low``, ``scale`` and ``bias`` of a
            :class:`distill.normalization.LatentNormalization`.
    """

    _optional_components = ["vae"]

    # Not annotated as SCMNetwork: with remote code diffusers runs this module once for the pipeline and once more for
    # the network, so that one class exists twice and its type check would warn on every load.
    def __init__(
        self, network: ModelMixin, scheduler: SCMScheduler, vae: ModelMixin | None = None,
        normalization: dict | None = None,
    ):  # fmt: skip
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler, vae=vae)
        self.register_to_config(normalization=normalization)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "SCMPipeline":
        """Load an exported folder or Hub repository with the code at hand; nothing that it carries is executed.

        Args:
            kwargs: options of ``ModelMixin.from_pretrained``, for example ``revision`` or ``token``.
        """
        # DiffusionPipeline.from_pretrained would insist on the code in the folder, and so on trust_remote_code.
        network = SCMNetwork.from_pretrained(pretrained_model_name_or_path, subfolder="network", **kwargs)
        hub = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
        scheduler = SCMScheduler.from_pretrained(pretrained_model_name_or_path, subfolder="scheduler", **hub)
        index = cls.load_config(pretrained_model_name_or_path, **hub)
        if "vae" not in index:
            return cls(network, scheduler)
        cls_vae = autoencoder_class(index["vae"][1], f"the vae in {pretrained_model_name_or_path}")
        vae = cls_vae.from_pretrained(pretrained_model_name_or_path, subfolder="vae", **kwargs)
        return cls(network, scheduler, vae, index["normalization"])

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: int | list[int] | Tensor | None = None,
        num_inference_steps: int = 2,
        timesteps: list[float] | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ):
        """Images, or latents of a network of latents without a ``vae``.

        Args:
            batch_size: number of images; by default one per label, or 1.
            class_labels: one class for all images, or one per image; by default they cycle through the classes.
            num_inference_steps: network evaluations, 1 to 8.
            timesteps: sampling times in radians, decreasing, in place of ``num_inference_steps`` and its defaults.
            guidance_scale: for a network that takes the guidance scale as an input, and only there; by default the
                lowest that it was distilled at.
            generator: on the CPU, where all noise is drawn. One generator seeds every image on its own, so that image
                ``i`` does not depend on the batch size; a list gives image ``i`` its generator; by default torch's
                global one is used.
            output_type: ``pil``, ``np`` ``(N, H, W, C)`` in [0, 1], or ``pt`` ``(N, C, H, W)`` in [0, 1]; latents that
                there is no ``vae`` for come in the last two as they are. ``latent``: ``(N, C, H, W)`` as the network made
                it, neither decoded nor clamped.

        Raises:
            ValueError: an argument that is not allowed, with what is.
        """
        config, device = self.network.config, self._execution_device
        self.check_output(output_type)
        labels = self.prepare_labels(class_labels, batch_size)
        num = (1 if batch_size is None else batch_size) if labels is None else len(labels)
        guidance = self.prepare_guidance(guidance_scale, num)
        times = self.prepare_times(num_inference_steps, timesteps)
        generators = self.prepare_generators(generator, num)

        noise = torch.stack([torch.randn(tuple(config.sample_shape), generator=g) for g in generators])
        sample = config.sigma_data * noise.to(device)
        self.scheduler.set_timesteps(
            len(times), timesteps=[*times, 0.0], max_timesteps=None, intermediate_timesteps=None, device=device
        )
        for t in self.progress_bar(self.scheduler.timesteps[:-1]):
            F = self.network(sample, t.expand(num), labels, guidance)
            sample, denoised = self.scheduler.step(
                config.sigma_data * F, t, sample, generator=generators, return_dict=False
            )
        images = denoised if output_type == "latent" else self.finish(denoised, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def check_output(self, output_type: str) -> None:
        """Raise ``ValueError`` for what cannot be computed or returned."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; allowed: {', '.join(OUTPUT_TYPES)}")
        channels = self.network.config.sample_shape[0]
        if output_type == "pil" and self.vae is None and (self.network.model.latents or channels not in (1, 3)):
            raise ValueError(f"samples with {channels} channels are no PIL images; use output_type='pt' or 'np'")
        if self.network.dtype != torch.float32:
            raise ValueError(
                f"the network's weights are {self.network.dtype} and must be float32; for speed, call the pipeline "
                "inside torch.autocast"
            )

    def prepare_labels(self, class_labels, batch_size: int | None) -> Tensor | None:
        """``(N,)`` classes on the pipeline's device; ``None`` for an unconditional network."""
        classes = self.network.config.num_classes
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if classes is None:
            if class_labels is not None:
                raise ValueError("this model is unconditional and takes no class_labels")
            return None
        if class_labels is None:
            return torch.arange(batch_size or 1, device=self._execution_device) % classes
        labels = integer_labels(class_labels, "class_labels").to(self._execution_device)
        if labels.ndim == 0:
            labels = labels.expand(batch_size or 1)
        if batch_size is not None and len(labels) != batch_size:
            raise ValueError(f"batch_size {batch_size} needs as many class_labels, got {len(labels)}")
        bad = labels[(labels < 0) | (labels >= classes)]
        if len(bad):
            raise ValueError(f"label {bad[0].item()} is out of range: this model has classes 0 to {classes - 1}")
        return labels

    def prepare_guidance(self, guidance_scale: float | None, num: int) -> Tensor | None:
        """``(N,)`` guidance scales; ``None`` for a network that was distilled at one scale."""
        config = self.network.config
        if not self.network.model.accepts_guidance:
            if guidance_scale is not None:
                fixed = "fixed" if config.guidance_scale is None else f"fixed at {config.guidance_scale}"
                raise ValueError(f"the guidance scale of this student is {fixed}; it takes no guidance_scale")
            return None
        low, high = config.guidance_range or (1.0, float("inf"))
        scale = low if guidance_scale is None else guidance_scale
        if not low <= scale <= high:
            raise ValueError(f"this student takes a guidance_scale from {low} to {high}, got {guidance_scale}")
        return torch.full((num,), float(scale), device=self._execution_device)

    def prepare_times(self, num_inference_steps: int, timesteps: list[float] | None) -> list[float]:
        """Sampling times in radians: those given, those found for this student, or the defaults."""
        if timesteps is not None:
            times = [float(t) for t in timesteps]
            check_times(times)
            return times
        found = (self.network.config.sampling or {}).get(str(num_inference_steps))
        return found or student_times(num_inference_steps, self.network.config.sigma_data)

    @staticmethod
    def prepare_generators(generator, num: int) -> list[torch.Generator]:
        """One CPU generator per image."""
        given = list(generator) if isinstance(generator, list | tuple) else [generator]
        if any(g is not None and g.device.type != "cpu" for g in given):
            raise ValueError("generator must be on the CPU, where noise is drawn, so that a seed means the same everywhere")
        if isinstance(generator, list | tuple):
            if len(given) != num:
                raise ValueError(f"{num} images need {num} generators, got {len(given)}")
            return given
        return [torch.Generator().manual_seed(seed) for seed in sample_seeds(num, generator)]

    def finish(self, samples: Tensor, output_type: str):
        """Samples as images in the form asked for: decoded if they are latents, which otherwise stay as they are."""
        if self.vae is not None:
            own = self.config.normalization
            constants = LatentNormalization(own["image_low"], own["scale"], own["bias"])
            # One at a time: each takes far more memory than its latent.
            samples = torch.cat([decode(self.vae, x, constants) for x in samples.to(self.vae.dtype).split(1)])
        elif self.network.model.latents:
            return samples if output_type == "pt" else samples.cpu().permute(0, 2, 3, 1).numpy()
        return self.postprocess(samples, output_type)

    @staticmethod
    def postprocess(samples: Tensor, output_type: str):
        """Samples in [-1, 1] as images in the form asked for."""
        images = (samples.float().clamp(-1, 1) + 1) / 2
        if output_type == "pt":
            return images
        images = images.cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "np":
            return images
        pixels = (images * 255).round().astype("uint8")
        return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]
