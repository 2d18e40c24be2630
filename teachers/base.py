"""The one interface every teacher and student is seen through: the TrigFlow network ``F(x_t, t, condition)``."""

import copy
import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from teachers.condition import Condition, Embeddings, example_text, fits, join, replace_rows
from teachers.networks import build, is_ours, is_registered
from teachers.parameterization import Parameterization


class Teacher(nn.Module):
    """A native network behind its parameterization: ``forward(x_t, t, labels=None) -> F``.

    ``dx_t/dt = sigma_data * F`` is the PF-ODE of TrigFlow (arXiv 2410.11081, equation 3). A student is the same class
    around a copy of the native network; what is saved is always the native weights.

    Args:
        native: any network called as ``native(x, time)`` or ``native(x, time, labels)``; its result has the shape of
            ``x``. One that has an attribute ``text_condition``, the shapes of one prompt's embeddings by name, is called
            as ``native(x, time, {name: tensor})``; a first axis of tokens may have another length.
        parameterization: what its input, time and output mean.
        sigma_data: standard deviation of the data, in the units of ``x``.
        sample_shape: ``(C, H, W)``, or ``(C, F, H, W)`` for videos: one sample without the batch.
        num_classes: number of classes, ``None`` if unconditional.
        label_format: ``"index"`` passes integers with ``num_classes`` as the null class, ``"one_hot"`` passes
            ``(B, num_classes)`` with zeros as the null class.
        guidance_scale: guidance ``F_g + w (F - F_g)``, where ``F_g`` is the network with the null class
            (classifier-free) or the ``guidance_teacher``; 1 evaluates the network itself only.
        guidance_interval: TrigFlow times ``(low, high)`` inside which guidance is applied (arXiv 2404.07724);
            ``None`` applies it everywhere.
        guidance_teacher: a second network to guide away from, in place of the null class of the first: an unconditional
            one (EDM2, arXiv 2312.02696), or a weaker one, which gets the same labels (autoguidance, arXiv 2406.02507).
            Its own guidance is ignored. It is part of this module, and so moves with it, but stays in eval mode and is
            in no student and no saved model.
        source: the name or path it was loaded from, for messages and cards.
        latents: whether samples are latents of an autoencoder, not images in [-1, 1]; ``None``: unless they have 1 or 3
            channels, as images do.
        null_prompt: of a network of texts: the embeddings of the empty or negative prompt, one row. It stands where a
            class-conditional network has its null class.

    Wherever ``labels`` are asked for, a network of texts takes :class:`teachers.condition.Embeddings` in their place.
    """

    def __init__(
        self,
        native: nn.Module,
        parameterization: Parameterization,
        sigma_data: float,
        sample_shape: tuple[int, ...],
        num_classes: int | None = None,
        label_format: str = "index",
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        source: str | None = None,
        guidance_teacher: "Teacher | None" = None,
        null_prompt: Embeddings | None = None,
        latents: bool | None = None,
    ):
        super().__init__()
        if label_format not in LABEL_FORMATS:
            raise ValueError(f"label_format is {label_format!r}; allowed: {', '.join(LABEL_FORMATS)}")
        if not isinstance(parameterization, Parameterization):
            raise ValueError(
                f"parameterization must be a teachers.Parameterization, such as teachers.VP_V, got {parameterization!r}"
            )
        if len(tuple(sample_shape)) not in (3, 4):
            raise ValueError(f"sample_shape must be (C, H, W), or (C, F, H, W) for videos, got {tuple(sample_shape)}")
        if sigma_data <= 0:
            raise ValueError(f"sigma_data must be positive, got {sigma_data}")
        self.native = native
        self.parameterization = parameterization
        self.sigma_data = float(sigma_data)
        self.sample_shape = tuple(sample_shape)
        self.num_classes = num_classes
        self.label_format = label_format
        self.guidance_scale = guidance_scale
        self.guidance_interval = guidance_interval
        self.source = source
        self.guidance_teacher = guidance_teacher
        self.null_prompt = null_prompt
        self.latents = not has_image_channels(self.sample_shape) if latents is None else latents
        if guidance_teacher is not None:
            self.check_guidance_teacher(guidance_teacher)
            guidance_teacher.eval()

    @property
    def accepts_guidance(self) -> bool:
        """Whether the native network has a guidance-scale input (a student distilled over a range of scales)."""
        return bool(getattr(self.native, "guidance_embedding", False))

    @property
    def text_condition(self) -> dict[str, tuple[int, ...]] | None:
        """The shapes of one prompt's embeddings by name; ``None`` for a network that takes no text."""
        return getattr(self.native, "text_condition", None)

    @property
    def is_conditional(self) -> bool:
        """Whether the network is told a class or a text."""
        return self.num_classes is not None or self.text_condition is not None

    def forward(self, x_t: Tensor, t: Tensor, labels: Condition | None = None, guidance: Tensor | None = None) -> Tensor:
        """``F`` ``(B, C, H, W)`` at ``x_t`` ``(B, C, H, W)``, times ``t`` ``(B,)`` in radians (fp32 or fp64, never
        rounded below fp32), integer ``labels`` ``(B,)`` (``num_classes`` is the null class; ``None`` is all null).

        ``guidance`` ``(B,)`` holds one guidance scale per sample, in place of ``guidance_scale``: a network with a
        guidance input is asked for that scale in one evaluation, any other one is guided with it.

        Raises:
            ValueError: samples of another shape, guidance without labels or anything to guide from, a network whose
                result has another shape than its input.
        """
        if self.accepts_guidance:
            fixed = None if self.guidance_scale == 1.0 else torch.full_like(t, self.guidance_scale)
            return self.evaluate(x_t, t, labels, fixed if guidance is None else guidance)
        if guidance is None and self.guidance_scale == 1.0:
            return self.evaluate(x_t, t, labels)
        return self.guided(x_t, t, labels, torch.full_like(t, self.guidance_scale) if guidance is None else guidance)

    def evaluate(
        self, x_t: Tensor, t: Tensor, labels: Condition | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        """One evaluation of the native network, without guidance."""
        if tuple(x_t.shape[1:]) != self.sample_shape:
            got, own = tuple(x_t.shape[1:]), self.sample_shape
            raise ValueError(f"samples have shape {got}, but {self.source or 'this model'} takes {own}")
        # fp64 on B numbers is free and keeps log tan t and its derivative exact up to the ends of the interval.
        t = t.double()
        c = self.parameterization.coefficients(t, self.sigma_data)
        scale = c.input_scale.to(x_t.dtype).view((-1,) + (1,) * (x_t.ndim - 1))
        # Networks of ours take it as it is, and round only its sines and cosines.
        time = c.time if x_t.dtype == torch.float64 or is_ours(self.native) else c.time.float()
        condition = {"guidance": guidance.to(time.dtype)} if guidance is not None else {}
        args = (self.native_condition(labels, x_t),) if self.is_conditional else ()
        u = self.native(x_t * scale, time, *args, **condition)
        if not torch.is_tensor(u) or u.shape != x_t.shape:
            got = tuple(u.shape) if torch.is_tensor(u) else type(u).__name__
            name = type(self.native).__name__
            raise ValueError(f"{name} must return a tensor of its input's shape {tuple(x_t.shape)}, got {got}")
        return self.parameterization.to_trigflow(u.to(x_t.dtype), x_t, t, c, self.sigma_data)

    def guided(self, x_t: Tensor, t: Tensor, labels: Condition | None, scale: Tensor) -> Tensor:
        """Guidance ``F_g + w (F - F_g)`` at scales ``(B,)``, combined on ``F`` (guidance commutes with the affine map)."""
        if self.is_conditional and labels is None:
            raise ValueError(f"guidance needs {'labels' if self.text_condition is None else 'text embeddings'}, got none")
        F, F_g = self.null_class_pair(x_t, t, labels) if self.guidance_teacher is None else self.pair(x_t, t, labels)
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            scale = torch.where((t >= low) & (t <= high), scale, 1.0)
        scale = scale.to(x_t.dtype).view((-1,) + (1,) * (x_t.ndim - 1))
        return F_g + scale * (F - F_g)

    def null_class_pair(self, x_t: Tensor, t: Tensor, labels: Condition) -> tuple[Tensor, Tensor]:
        """``F`` with the labels and with the null class, or with the prompts and the null prompt, in one batch."""
        if not self.is_conditional:
            raise ValueError(f"{self.source or 'this model'} is unconditional and cannot be guided")
        both = join(labels, self.null_condition(len(x_t), x_t.device))
        return self.evaluate(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)

    def pair(self, x_t: Tensor, t: Tensor, labels: Condition | None) -> tuple[Tensor, Tensor]:
        """``F`` of this network and of its guidance teacher, each through its own parameterization."""
        guide = self.guidance_teacher
        return self.evaluate(x_t, t, labels), guide.evaluate(x_t, t, labels if guide.is_conditional else None)

    def check_guidance_teacher(self, guide: "Teacher") -> None:
        """Raise ``ValueError`` unless ``guide`` is a network for the same samples, with the same classes or none."""
        name = f"guidance teacher {guide.source!r}" if guide.source else "the guidance teacher"
        if self.accepts_guidance:
            raise ValueError(f"{self.source or 'this model'} takes the guidance scale as an input and no guidance teacher")
        for key in ("sample_shape", "sigma_data"):
            own, other = getattr(self, key), getattr(guide, key)
            if own != other:
                raise ValueError(f"{name} has {key} {other}, the teacher that it guides has {own}")
        if guide.num_classes not in (None, self.num_classes):
            own = "none" if self.num_classes is None else self.num_classes
            raise ValueError(f"{name} has {guide.num_classes} classes, the teacher that it guides has {own}")
        if guide.text_condition not in (None, self.text_condition):
            own = "none" if self.text_condition is None else self.text_condition
            raise ValueError(f"{name} takes text embeddings {guide.text_condition}, the teacher that it guides {own}")

    def _apply(self, fn, recurse: bool = True) -> "Teacher":
        """As ``nn.Module._apply``; the null prompt goes along to the device, in the precision that it has."""
        super()._apply(fn, recurse)
        if self.null_prompt is not None:
            here = next(iter(self.null_prompt.tensors.values())).new_empty(0, dtype=torch.long)
            self.null_prompt = self.null_prompt.to(fn(here).device)
        return self

    def train(self, mode: bool = True) -> "Teacher":
        """As ``nn.Module.train``; the guidance teacher stays in eval mode."""
        super().train(mode)
        if self.guidance_teacher is not None:
            self.guidance_teacher.eval()
        return self

    def native_condition(self, labels: Condition | None, x_t: Tensor) -> Tensor | dict[str, Tensor]:
        """Labels or prompts as the native network wants them; ``None`` is the null class or the null prompt."""
        condition = self.null_condition(len(x_t), x_t.device) if labels is None else labels
        if self.text_condition is None:
            return LABEL_FORMATS[self.label_format](condition, self.num_classes)
        self.check_text(condition)
        return condition.to(x_t.device, x_t.dtype).tensors

    def null_condition(self, num: int, device) -> Condition:
        """The null class ``(num,)``, or the null prompt for so many samples.

        Raises:
            ValueError: the network has none.
        """
        if self.text_condition is None:
            self.require_null_class()
            return torch.full((num,), self.num_classes, device=device)
        if self.null_prompt is None:
            raise ValueError(f"{self.source or 'this model'} needs text embeddings, and has none of an empty prompt")
        return self.null_prompt.to(device).expand(num)

    def drop_condition(self, labels: Condition, rows: Tensor) -> Condition:
        """The labels or prompts, with the null class or prompt where the mask ``rows`` ``(B,)`` is set."""
        return replace_rows(labels, rows, self.null_condition(len(rows), rows.device))

    def example_condition(self, num: int, device=None) -> Condition | None:
        """Some condition to try the network out with: the classes in turn; the null prompt, or some noise."""
        if self.text_condition is None:
            return None if self.num_classes is None else torch.arange(num, device=device) % self.num_classes
        if self.null_prompt is None:
            return example_text(self.text_condition, num, device)
        return self.null_condition(num, device)

    def require_null_class(self) -> None:
        """Raise ``ValueError`` for a network that says it was built without one (``null_class`` is false)."""
        if not getattr(self.native, "null_class", True):
            raise ValueError(
                f"{self.source or 'this model'} was trained without label dropout: it has no null class, so it always "
                "needs labels and cannot be guided"
            )

    def check_text(self, text: Condition) -> None:
        """Raise ``ValueError`` unless these are the embeddings that the network takes, of any number of tokens."""
        wanted = self.text_condition
        if not isinstance(text, Embeddings):
            raise ValueError(f"{self.source or 'this model'} takes text embeddings {', '.join(wanted)}, not labels")
        if not fits(text.shapes(), wanted):
            raise ValueError(f"{self.source or 'this model'} takes text embeddings of shapes {wanted}, got {text.shapes()}")

    def check_labels(self, labels: Tensor) -> None:
        """Raise ``ValueError`` unless every label is a class, or ``num_classes`` for the null class."""
        if self.num_classes is None:
            raise ValueError(f"{self.source or 'this model'} is unconditional and takes no labels")
        bad = labels[(labels < 0) | (labels > self.num_classes)]
        if (labels == self.num_classes).any():
            self.require_null_class()
        if len(bad):
            last = self.num_classes - 1
            raise ValueError(f"label {bad[0].item()} is out of range: this model has classes 0 to {last}")

    def twin(self, **changes) -> "Teacher":
        """The same network, not copied, with some of the arguments of :class:`Teacher` changed."""
        own = dict(
            native=self.native, parameterization=self.parameterization, sigma_data=self.sigma_data,
            sample_shape=self.sample_shape, num_classes=self.num_classes, label_format=self.label_format,
            guidance_scale=self.guidance_scale, guidance_interval=self.guidance_interval, source=self.source,
            guidance_teacher=self.guidance_teacher, null_prompt=self.null_prompt, latents=self.latents,
        )  # fmt: skip
        return Teacher(**{**own, **changes}).train(self.training)

    def student(self, guidance_embedding: bool = False) -> "Teacher":
        """A trainable copy with the same convention, without guidance, sharing nothing.

        With ``guidance_embedding`` the native network is rebuilt with its zero-initialised guidance input. A frozen
        teacher's copy trains again, except for what its network never trains (position tables).

        Raises:
            ValueError: ``guidance_embedding`` for a network that has no such argument.
        """
        wider = guidance_embedding and not self.accepts_guidance
        native = with_guidance_embedding(self.native) if wider else copy.deepcopy(self.native)
        unfreeze(native)
        return self.twin(native=native, guidance_scale=1.0, guidance_interval=None, guidance_teacher=None)

    def guided_by(
        self,
        guidance_scale: float,
        guidance_interval: tuple[float, float] | None = None,
        guidance_teacher: "Teacher | None" = None,
    ) -> "Teacher":
        """The same network, not copied, under another guidance; see :class:`Teacher` for the arguments.

        Raises:
            ValueError: a guidance teacher for other samples or classes, or with another ``sigma_data``.
        """
        return self.twin(
            guidance_scale=guidance_scale, guidance_interval=guidance_interval, guidance_teacher=guidance_teacher
        )

    def at_sigma_data(self, sigma_data: float) -> "Teacher":
        """The same network, not copied, as the ``F`` of data of another standard deviation, if it is free of its own: VP and
        flow networks are, exactly. Others are returned as they are.
        """
        p = self.parameterization
        if sigma_data == self.sigma_data or p.family not in ("vp", "flow") or p.time == "trigflow":
            return self
        guide = None if self.guidance_teacher is None else self.guidance_teacher.at_sigma_data(sigma_data)
        return self.twin(sigma_data=sigma_data, guidance_teacher=guide)

    def at_sample_shape(self, sample_shape: Sequence[int]) -> "Teacher":
        """The same network, not copied, for samples of another size, if it takes any: those of diffusers that are told a
        text do. Others, and those of other channels, are returned as they are.

        Raises:
            ValueError: a size that such a network does not take.
        """
        shape = tuple(sample_shape)
        other = shape != self.sample_shape and shape[:1] == self.sample_shape[:1]
        if not other or not hasattr(self.native, "check_sample_shape"):
            return self
        self.native.check_sample_shape(shape)
        guide = None if self.guidance_teacher is None else self.guidance_teacher.at_sample_shape(shape)
        return self.twin(sample_shape=shape, guidance_teacher=guide)

    def metadata(self) -> dict:
        """Everything but the weights and the architecture, as plain JSON values."""
        facts = {
            "parameterization": self.parameterization.to_dict(),
            "sigma_data": self.sigma_data,
            "sample_shape": list(self.sample_shape),
            "num_classes": self.num_classes,
            "label_format": self.label_format,
        }
        return facts | ({"latents": self.latents} if self.latents == has_image_channels(self.sample_shape) else {})


def has_image_channels(sample_shape: tuple[int, ...]) -> bool:
    return sample_shape[0] in (1, 3)


def with_guidance_embedding(native: nn.Module) -> nn.Module:
    """``native`` rebuilt with a zero-initialised guidance-scale input (sCM, section 5.2).

    Raises:
        ValueError: for a network that cannot be rebuilt, or not with a guidance input.
    """
    if not is_registered(native) or "guidance_embedding" not in inspect.signature(type(native)).parameters:
        raise ValueError(f"{type(native).__name__} has no guidance input; distil it at a fixed guidance_scale instead")
    parameter = next(native.parameters())
    wider = build(type(native).__name__, {**native.config, "guidance_embedding": True})
    if not getattr(wider, "guidance_embedding", False):
        name = type(native).__name__
        raise ValueError(f"{name} takes guidance_embedding, but does not keep it as an attribute of that name")
    wider.to(parameter.device, parameter.dtype)
    wider.load_state_dict({**wider.state_dict(), **native.state_dict()})
    return wider


def unfreeze(native: nn.Module) -> None:
    """Make trainable again what a registered network trains when built; all of another one that is frozen whole."""
    if is_registered(native):
        with torch.device("meta" if is_ours(native) else "cpu"):
            built = build(type(native).__name__, native.config)
        for p, reference in zip(native.parameters(), built.parameters(), strict=True):
            p.requires_grad_(reference.requires_grad)
    elif not any(p.requires_grad for p in native.parameters()):
        native.requires_grad_(True)


LABEL_FORMATS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "index": lambda labels, num_classes: labels,
    # The null class, num_classes, is none of these: it becomes all zeros.
    "one_hot": lambda labels, num_classes: (labels[:, None] == torch.arange(num_classes, device=labels.device)).float(),
}


def wrap(
    module: nn.Module,
    parameterization: Parameterization,
    sigma_data: float,
    sample_shape: tuple[int, ...],
    num_classes: int | None = None,
    label_format: str = "index",
    latents: bool | None = None,
) -> Teacher:
    """Bring any ``nn.Module`` in one line; see :class:`Teacher` for the arguments.

    >>> teacher = wrap(my_unet, teachers.EDM, sigma_data=0.5, sample_shape=(3, 32, 32))
    """
    return Teacher(module, parameterization, sigma_data, sample_shape, num_classes, label_format, latents=latents)
