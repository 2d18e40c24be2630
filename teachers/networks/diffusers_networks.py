"""Networks of diffusers behind the call of our own, ``network(x, time, labels=None)``: their code, their tensor names."""

import math
import re

import torch
from torch import Tensor, nn

from teachers.networks.layers import ExactConv2d, ExactLinear, GroupNorm, TimeEmbedding

# Embeddings of a size or a guidance scale by the same class, which are no function of the time.
OTHER_TIMESTEPS = ("add_time_proj", "additional_condition_proj", "guidance_condition_proj")
# What of a U-Net is on the path of the time, or on that of the sample from end to end past all residual branches: a
# fiftieth of SDXL's work, a seventeenth of Stable Diffusion's. All of its layers read what is rounded here.
TRUNK = re.compile(
    r"(^|\.)((time|add)_embedding\.linear_[12]|time_emb_proj|conv_(in|out|shortcut)|proj_(in|out)|downsamplers\.\d+\.conv)$"
)
EXACT = {nn.Linear: ExactLinear, nn.Conv2d: ExactConv2d}


class DiffusersTimesteps(TimeEmbedding):
    """diffusers' ``Timesteps``, whose own code rounds every time to fp32: ``[sin(w t), cos(w t)]``, or cos first."""

    def __init__(self, theirs: nn.Module):
        super().__init__()
        self.half, self.flip = theirs.num_channels // 2, theirs.flip_sin_to_cos
        self.shift, self.scale = theirs.downscale_freq_shift, theirs.scale

    def frequencies(self, device, dtype):
        ramp = torch.arange(self.half, device=device, dtype=dtype) / (self.half - self.shift)
        return self.scale * torch.exp(-math.log(10_000) * ramp)

    def forward(self, timesteps: Tensor) -> Tensor:
        angles = self.angles(timesteps)
        parts = (angles.cos(), angles.sin()) if self.flip else (angles.sin(), angles.cos())
        return torch.cat(parts, dim=1)


def diffusers_model(name: str, config: dict) -> nn.Module:
    """A model of diffusers from its own config, made fit for forward-mode AD.

    Raises:
        ValueError: a config that its class cannot be built from.
    """
    import diffusers  # slow, and not every network needs it

    try:
        model = getattr(diffusers, name).from_config(config)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"diffusers' {name} cannot be built from its config: {error}") from None
    for module in list(model.modules()):
        if type(module) is nn.GroupNorm:
            module.__class__ = GroupNorm  # torch's own cannot be differentiated here; weights and result are the same
        for child_name, child in module.named_children():
            if type(child).__name__ == "Timesteps" and child_name not in OTHER_TIMESTEPS:
                setattr(module, child_name, DiffusersTimesteps(child))
    if name.startswith("UNet"):
        keep_trunk_exact(model)
    return model


def keep_trunk_exact(unet: nn.Module) -> None:
    """Autocast rounds nothing on a U-Net's trunk, so that the derivative in bf16 is off by less than 2 %, not 3 %."""
    for name, module in unet.named_modules():
        if TRUNK.search(name) and type(module) in EXACT:
            module.__class__ = EXACT[type(module)]


class DiffusersUNet2D(nn.Module):
    """``diffusers.UNet2DModel`` (DDPM, DDIM, consistency models): ``forward(x, t, labels=None) -> (B, C, H, W)``.

    Args:
        config: the model's own config, as diffusers saves it.
    """

    null_class = False

    def __init__(self, config: dict):
        super().__init__()
        self.model = diffusers_model("UNet2DModel", config)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.model(x, t, class_labels=labels, return_dict=False)[0][:, : x.shape[1]]


class DiffusersDiT(nn.Module):
    """``diffusers.DiTTransformer2DModel``: ``forward(x, t, labels) -> (B, C, H, W)``; a learned variance is dropped.

    Args:
        config: the model's own config, as diffusers saves it.
    """

    shared_blocks = ("model.transformer_blocks.0",)  # its last layer reads the first block's embedding

    def __init__(self, config: dict):
        super().__init__()
        self.model = diffusers_model("DiTTransformer2DModel", config)
        for module in self.model.modules():
            if hasattr(module, "class_embedder"):
                module.class_embedder.dropout_prob = 0.0  # labels are dropped by the objective, not here

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        # With dropout_prob 0 the null class has no special place: it is the last row of the table.
        return self.model(x, t, class_labels=labels, return_dict=False)[0][:, : x.shape[1]]
