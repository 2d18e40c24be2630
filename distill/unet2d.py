"""OpenAI's U-Net as diffusers' ``UNet2DModel``: the same function under other names, for pipelines of diffusers' own."""

import inspect

from diffusers import UNet2DModel
from torch import Tensor

from teachers.networks import OpenAIUNet
from teachers.networks.openai_unet import OpenAIAttention

# Our names -> theirs: layers that occur once, and layers of blocks.
WHOLE = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2", "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip
MIDDLE = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
PARTS = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut", "norm": "group_norm", "proj_out": "to_out.0", "op": "conv",
    "conv": "conv",
}  # fmt: skip


def as_unet2d(native: OpenAIUNet) -> UNet2DModel:
    """The ``UNet2DModel`` of the same function, in eval mode, sharing nothing with ``native``."""
    model = UNet2DModel(**unet2d_config(native))
    model.load_state_dict(unet2d_tensors(native))
    return model.eval()


def arguments(native: OpenAIUNet) -> dict:
    """The arguments that ``native`` was built with, defaults included."""
    parameters = inspect.signature(OpenAIUNet).parameters.values()
    return {**{p.name: p.default for p in parameters}, **native.config}


def unet2d_config(native: OpenAIUNet) -> dict:
    own = arguments(native)
    updown, sizes = own["resblock_updown"], [own["image_size"] >> level for level in range(len(own["channel_mult"]))]
    attends = [size in own["attention_resolutions"] for size in sizes]
    down, up = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if updown else ("DownBlock2D", "UpBlock2D")
    return {
        "sample_size": own["image_size"],
        "in_channels": own["in_channels"],
        "out_channels": own["out_channels"],
        "block_out_channels": [int(own["num_channels"] * mult) for mult in own["channel_mult"]],
        "layers_per_block": own["num_res_blocks"],
        "down_block_types": ["AttnDownBlock2D" if here else down for here in attends],
        "up_block_types": ["AttnUpBlock2D" if here else up for here in reversed(attends)],
        "downsample_type": "resnet" if updown else "conv",
        "upsample_type": "resnet" if updown else "conv",
        "attention_head_dim": own["num_head_channels"],
        "attn_norm_num_groups": 32,
        "resnet_time_scale_shift": "scale_shift" if own["use_scale_shift_norm"] else "default",
        "num_class_embeds": own["num_classes"],
        "dropout": float(own["dropout"]),
    }


def unet2d_tensors(native: OpenAIUNet) -> dict[str, Tensor]:
    """The tensors of ``native`` by their names in diffusers."""
    tensors = {}
    for name, value in native.state_dict().items():
        path, kind = name.rsplit(".", 1)
        if path in WHOLE:
            tensors[f"{WHOLE[path]}.{kind}"] = value
            continue
        stack, index, *rest = path.split(".")
        layer = () if stack == "middle_block" else (rest.pop(0),)
        place, part = block_place(native, stack, int(index), *map(int, layer)), ".".join(rest)
        if part in ("qkv", "proj_out") and kind == "weight":
            value = value.flatten(1)  # a convolution of one pixel, there a linear layer
        if part == "qkv":
            queries_keys_values = split_heads(native.get_submodule(path.removesuffix(".qkv")), value)
            tensors |= {f"{place}.to_{q}.{kind}": v for q, v in zip("qkv", queries_keys_values, strict=True)}
        else:
            tensors[f"{place}.{PARTS[part]}.{kind}"] = value
    return tensors


def split_heads(attention: OpenAIAttention, value: Tensor) -> tuple[Tensor, ...]:
    """A weight or bias of ``qkv`` as those of queries, keys and values."""
    if not attention.legacy:
        return value.chunk(3)
    return tuple(part.flatten(0, 1) for part in value.unflatten(0, (attention.num_heads, 3, -1)).unbind(1))


def block_place(native: OpenAIUNet, stack: str, index: int, layer: int = 0) -> str:
    """Where layer ``layer`` of block ``index`` of the encoder, decoder or bottom is in diffusers' model."""
    if stack == "middle_block":
        return MIDDLE[index]
    encoder = stack == "input_blocks"
    # A level of the encoder ends with what leads to the next; one of the decoder has a residual block more.
    blocks = arguments(native)["num_res_blocks"] + 1
    level, within = divmod(index - 1 if encoder else index, blocks)
    side = "down" if encoder else "up"
    if isinstance(getattr(native, stack)[index][layer], OpenAIAttention):
        return f"{side}_blocks.{level}.attentions.{within}"
    if layer == 0 and not (encoder and within == blocks - 1):
        return f"{side}_blocks.{level}.resnets.{within}"
    return f"{side}_blocks.{level}.{side}samplers.0"
