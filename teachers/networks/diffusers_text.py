"""Networks of diffusers that are told a text, behind the call of our own, ``network(x, time, text, guidance=None)``.

Their code and tensor names; what their pipelines do around the call (packed latents, position ids, sizes) is done here, and
what they round of the time is not.
"""

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from teachers.condition import is_mask
from teachers.networks.diffusers_networks import diffusers_model

Text = dict[str, Tensor]
VAE_SCALE = 8  # pixels to a latent, for the networks that are told the size of the image: all of them have such a VAE


class DiffusersText(nn.Module):
    """A network of ``TEXT_NETWORKS``: ``forward(x, time, text, guidance=None)`` to a tensor of the shape of ``x``.

    ``x`` ``(B, C, H, W)``, or ``(B, C, F, H, W)`` for videos, is never packed; ``time`` ``(B,)`` is what its pipeline gives
    it, in fp32 or fp64; ``text`` holds the embeddings of ``text_condition``, by the names of diffusers' own ``forward``, a
    mask as zeros and ones of any dtype. A learned variance is dropped. A network with a guidance input
    (``guidance_embedding``) gets scales ``guidance`` ``(B,)``, by default 1: the prompt itself, not amplified.

    Args:
        cls: the class in diffusers.
        config: its own config, as diffusers saves it.

    Raises:
        ValueError: another class, or a network that needs more than noise, time and text; one sentence.
    """

    def __init__(self, cls: str, config: dict):
        super().__init__()
        if cls not in TEXT_NETWORKS:
            raise ValueError(f"class is {cls!r}; allowed: {', '.join(TEXT_NETWORKS)}")
        self.cls = cls
        self.model = diffusers_model(cls, config)
        check_text_config(cls, self.model.config)
        self.text_condition = TEXT_NETWORKS[cls].text(self.model.config)
        self.guidance_embedding = bool(self.model.config.get("guidance_embeds"))
        if cls == "FluxTransformer2DModel":
            exact_flux_times(self.model)
        if cls == "QwenImageTransformer2DModel":
            freeze_unused_text(self.model)

    @property
    def default_sample_shape(self) -> tuple[int, ...]:
        """Of one sample as its pipeline draws it unless told otherwise."""
        return TEXT_NETWORKS[self.cls].shape(self.model.config)

    def check_sample_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ``ValueError`` unless it takes samples of this shape ``(C, H, W)`` or ``(C, F, H, W)``."""
        own, step = self.default_sample_shape, TEXT_NETWORKS[self.cls].step(self.model.config)
        largest = TEXT_NETWORKS[self.cls].largest(self.model.config)
        if len(shape) != len(own) or shape[0] != own[0]:
            raise ValueError(f"{self.cls} takes samples like {own}, not {tuple(shape)}")
        if any(size % step or not 0 < size <= largest for size in shape[-2:]):
            limit = "" if largest == math.inf else f" up to {largest}"
            raise ValueError(f"{self.cls} takes heights and widths in multiples of {step}{limit}, not {tuple(shape[-2:])}")

    def forward(self, x: Tensor, time: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        if self.guidance_embedding and guidance is None:
            guidance = torch.ones_like(time)
        text = {name: tensor.bool() if is_mask(name) else tensor for name, tensor in text.items()}
        with KeepDoubles() if x.dtype == torch.float64 else nullcontext():
            return TEXT_NETWORKS[self.cls].call(self.model, x, time, text, guidance)[:, : x.shape[1]]


class KeepDoubles(TorchFunctionMode):
    """fp64 stays fp64: diffusers computes its norms and rotations in fp32, too coarse a reference for a derivative."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to_float = func is Tensor.float or (func is Tensor.to and torch.float32 in (*args[1:], *kwargs.values()))
        if to_float and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **kwargs)


class ExactTime:
    """A time that code of others hands on unrounded: a cast or a factor leaves it as it is, and the embedding that reads it
    has the factor among its frequencies.

    Flux and Qwen-Image cast the time to the dtype of their activations; in bf16 its derivative would be worthless.
    """

    def __init__(self, value: Tensor):
        self.value, self.dtype = value, value.dtype

    def to(self, *args, **kwargs) -> "ExactTime":
        return self

    def __mul__(self, factor: float) -> "ExactTime":
        return self

    def double(self) -> Tensor:
        return self.value.double()


class FluxTimeGuidance(nn.Module):
    """The forward of diffusers' embedding of time, guidance and text, with one embedding for each of the first two, so that
    that of the time can be replaced (:mod:`teachers.networks.trigflow_time`).
    """

    def forward(self, time: ExactTime, guidance: ExactTime, pooled: Tensor) -> Tensor:
        time = self.timestep_embedder(self.time_proj(time).to(pooled.dtype))
        guidance = self.guidance_embedder(self.guidance_proj(guidance).to(pooled.dtype))
        return time + guidance + self.text_embedder(pooled)


def exact_flux_times(model: nn.Module) -> None:
    """Move Flux's factor on time and guidance into the frequencies of their embeddings."""
    embedding = model.time_text_embed
    embedding.time_proj.scale = 1000
    if model.config.guidance_embeds:
        embedding.guidance_proj = copy.deepcopy(embedding.time_proj)
        embedding.__class__ = FluxTimeGuidance


def freeze_unused_text(model: nn.Module) -> None:
    """Freeze what the last block of Qwen-Image does to the text, which nothing reads: it would never get a gradient."""
    last = model.transformer_blocks[-1]
    for module in (last.attn.to_add_out, last.txt_mlp):
        module.requires_grad_(False)


def call_plain(model: nn.Module, x: Tensor, time: Tensor, text: Text, guidance: Tensor | None) -> Tensor:
    return model(x, timestep=time, **text, return_dict=False)[0]


def call_sana(model: nn.Module, x: Tensor, time: Tensor, text: Text, guidance: Tensor | None) -> Tensor:
    if guidance is not None:
        guidance = guidance * model.config.guidance_embeds_scale
    return model(x, timestep=time, guidance=guidance, **text, return_dict=False)[0]


def call_pixart(model: nn.Module, x: Tensor, time: Tensor, text: Text, guidance: Tensor | None) -> Tensor:
    sizes = {"resolution": None, "aspect_ratio": None}
    if model.use_additional_conditions:
        height, width = x.shape[-2:]
        resolution, ratio = filled(x, [VAE_SCALE * height, VAE_SCALE * width]), filled(x, [height / width])
        sizes = {"resolution": resolution.expand(len(x), 2), "aspect_ratio": ratio.expand(len(x), 1)}
    return model(x, timestep=time, **text, added_cond_kwargs=sizes, return_dict=False)[0]


def call_unet(model: nn.Module, x: Tensor, time: Tensor, text: Text, guidance: Tensor | None) -> Tensor:
    added = None
    if "text_embeds" in text:
        size = [VAE_SCALE * x.shape[2], VAE_SCALE * x.shape[3]]  # as if the image had been neither resized nor cropped
        time_ids = filled(x, [*size, 0, 0, *size]).expand(len(x), 6)
        added = {"text_embeds": text["text_embeds"], "time_ids": time_ids}
    tokens = text["encoder_hidden_states"]
    return model(x, time, encoder_hidden_states=tokens, added_cond_kwargs=added, return_dict=False)[0]


def call_flux(model: nn.Module, x: Tensor, time: Tensor, text: Text, guidance: Tensor | None) -> Tensor:
    height, width = x.shape[2] // 2, x.shape[3] // 2
    rows = torch.arange(height, device=x.device).repeat_interleave(width)
    columns = torch.arange(width, device=x.device).repeat(height)
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=1)
    out = model(
        pack_latents(x), timestep=ExactTime(time), guidance=None if guidance is None else ExactTime(guidance),
        img_ids=ids, txt_ids=ids.new_zeros(text["encoder_hidden_states"].shape[1], 3), **text, return_dict=False,
    )[0]  # fmt: skip
    return unpack_latents(out, height, width)


def call_qwen(model: nn.Module, x: Tensor, time: Tensor, text: Text, guidance: Tensor | None) -> Tensor:
    height, width = x.shape[2] // 2, x.shape[3] // 2
    shapes = [[(1, height, width)]] * len(x)
    out = model(pack_latents(x), timestep=ExactTime(time), img_shapes=shapes, **text, return_dict=False)[0]
    return unpack_latents(out, height, width)


def filled(x: Tensor, values: Sequence[float]) -> Tensor:
    """``(len(values),)`` of the kind of ``x``, which a GPU fills in by itself: a copy from the host would wait for it."""
    return torch.cat([x.new_full((1,), value) for value in values])


def pack_latents(x: Tensor) -> Tensor:
    """``(B, C, 2 H, 2 W)`` to tokens ``(B, H W, 4 C)`` of two by two latents, the channel slowest."""
    b, c, height, width = x.shape
    blocks = x.reshape(b, c, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(b, height * width // 4, 4 * c)


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of :func:`pack_latents`, with ``height`` and ``width`` in tokens."""
    blocks = tokens.reshape(len(tokens), height, width, -1, 2, 2)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, 2 * height, 2 * width)


def square_shape(config) -> tuple[int, ...]:
    size = config.sample_size
    if not size:
        raise ValueError("its config has no sample_size")
    return (config.in_channels, *(size if isinstance(size, list | tuple) else (size, size)))


def packed_shape(config) -> tuple[int, ...]:
    return (config.in_channels // 4, 128, 128)


def unet_text(config) -> dict[str, tuple[int, ...]]:
    shapes = {"encoder_hidden_states": (77, config.cross_attention_dim)}
    if config.addition_embed_type == "text_time":
        sizes = 6 * config.addition_time_embed_dim
        shapes["text_embeds"] = (config.projection_class_embeddings_input_dim - sizes,)
    return shapes


def masked_text(tokens: int, width: int, mask: str = "encoder_attention_mask") -> dict[str, tuple[int, ...]]:
    return {"encoder_hidden_states": (tokens, width), mask: (tokens,)}


def pooled_text(tokens: int, config) -> dict[str, tuple[int, ...]]:
    widths = config.joint_attention_dim, config.pooled_projection_dim
    return {"encoder_hidden_states": (tokens, widths[0]), "pooled_projections": (widths[1],)}


class TextNetwork(NamedTuple):
    """How a class of diffusers is called; everything but ``call`` is read from its config."""

    call: Callable[[nn.Module, Tensor, Tensor, Text, Tensor | None], Tensor]
    text: Callable  # shapes of the embeddings of a prompt; as many tokens as its pipeline pads to
    shape: Callable  # of a sample, where its pipeline is told no size
    step: Callable  # heights and widths are multiples of this
    largest: Callable = lambda config: math.inf  # height or width, as far as its position tables go


TEXT_NETWORKS: dict[str, TextNetwork] = {
    "UNet2DConditionModel": TextNetwork(
        call_unet, unet_text, square_shape, lambda c: 2 ** (len(c.down_block_types) - 1),
    ),
    "PixArtTransformer2DModel": TextNetwork(
        call_pixart, lambda c: masked_text(300, c.caption_channels or c.cross_attention_dim), square_shape,
        lambda c: c.patch_size,
    ),
    "SD3Transformer2DModel": TextNetwork(
        call_plain, lambda c: pooled_text(333, c), square_shape, lambda c: c.patch_size,
        lambda c: c.pos_embed_max_size * c.patch_size,
    ),
    "FluxTransformer2DModel": TextNetwork(call_flux, lambda c: pooled_text(512, c), packed_shape, lambda c: 2),
    "SanaTransformer2DModel": TextNetwork(
        call_sana, lambda c: masked_text(300, c.caption_channels), square_shape, lambda c: c.patch_size,
    ),
    "AuraFlowTransformer2DModel": TextNetwork(
        call_plain, lambda c: {"encoder_hidden_states": (256, c.joint_attention_dim)}, square_shape, lambda c: c.patch_size,
        lambda c: math.isqrt(c.pos_embed_max_size) * c.patch_size,
    ),
    "Lumina2Transformer2DModel": TextNetwork(
        call_plain, lambda c: masked_text(256, c.cap_feat_dim), square_shape, lambda c: c.patch_size,
        lambda c: min(c.axes_lens[1:]) * c.patch_size,
    ),
    "QwenImageTransformer2DModel": TextNetwork(
        call_qwen, lambda c: masked_text(512, c.joint_attention_dim, "encoder_hidden_states_mask"), packed_shape,
        lambda c: 2,
    ),
    "WanTransformer3DModel": TextNetwork(  # 81 frames of 480 x 832 pixels
        call_plain, lambda c: {"encoder_hidden_states": (512, c.text_dim)}, lambda c: (c.in_channels, 21, 60, 104),
        lambda c: c.patch_size[1], lambda c: c.rope_max_seq_len * c.patch_size[1],
    ),
}  # fmt: skip

# Parts that some networks of a class have for inputs that are neither noise nor time nor text.
OTHER_INPUTS: dict[str, tuple[str, ...]] = {
    "UNet2DConditionModel": ("encoder_hid_dim_type", "class_embed_type", "num_class_embeds", "time_cond_proj_dim"),
    "QwenImageTransformer2DModel": ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"),
    "WanTransformer3DModel": ("image_dim", "added_kv_proj_dim"),
}


def check_text_config(cls: str, config) -> None:
    """Raise ``ValueError`` for a network that needs more than noise, time and text."""
    for key in OTHER_INPUTS.get(cls, ()):
        if config[key]:
            raise ValueError(f"a {cls} with {key} {config[key]!r} needs more than noise, time and text")
    if cls == "UNet2DConditionModel" and config.addition_embed_type not in (None, "text_time"):
        raise ValueError(f"{cls} with addition_embed_type {config.addition_embed_type!r} is not supported")
    out = config.out_channels or config.in_channels
    if cls == "QwenImageTransformer2DModel":
        out *= config.patch_size**2
    if out not in (config.in_channels, 2 * config.in_channels):
        channels = f"takes {config.in_channels} channels and gives {out}"
        raise ValueError(f"a {cls} that {channels} needs more than noise, time and text")
