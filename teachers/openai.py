"""The EDM teachers of OpenAI's consistency_models (arXiv 2303.01469), recognised and configured from their tensors alone.

Such a file is a plain state dict: nothing in it says how the network was made. The architecture is read off names and
shapes; what those cannot say (the image size, 64 channels a head, EDM's preconditioning with ``sigma_data`` 0.5 and the
network's time ``250 log sigma``) is that of every published one. OpenAI's consistency models (``cd_*``, ``ct_*``) and EDM
teachers have the same tensors: which of them a file holds, only its name tells.
"""

import re

from torch import Tensor

from teachers.parameterization import Parameterization

PARAMETERIZATION = Parameterization("edm", "raw", "log_sigma/4", time_scale=1000.0)
SIGMA_DATA = 0.5
CHANNELS_PER_HEAD = 64
# What OpenAI's training scripts give a network of each size, the other way round.
IMAGE_SIZES = {(1, 2, 3, 4): 64, (1, 1, 2, 3, 4): 128, (1, 1, 2, 2, 4, 4): 256, (0.5, 1, 1, 2, 2, 4, 4): 512}
# One tensor of each part; the second tells this attention from the transformers of latent diffusion's U-Net.
NAMES = {
    "time_embed.2.weight", "middle_block.1.qkv.weight", "input_blocks.0.0.weight", "middle_block.2.in_layers.0.weight",
    "output_blocks.0.0.in_layers.2.weight", "out.2.weight",
}  # fmt: skip
# What ends a level of the decoder: a second residual block, or a convolution after nearest-neighbour upsampling.
UPSAMPLING = re.compile(r"output_blocks\.(\d+)\.[12]\.(in_layers\.2|conv)\.weight")


def is_consistency_model(name: str) -> bool:
    """Whether a file of this name holds one of OpenAI's consistency models, such as ``cd_imagenet64_lpips.pt``."""
    return re.match(r"c[dt]_", name) is not None


def matches(tensors: dict[str, Tensor]) -> bool:
    """Whether these are the tensors of an :class:`teachers.networks.OpenAIUNet`, by their names."""
    return NAMES <= tensors.keys()


def config(tensors: dict[str, Tensor]) -> dict:
    """``config.json`` as a value, for tensors that :func:`matches`; the keys are those of
    :func:`teachers.nvlabs.read_nvlabs`.

    Raises:
        ValueError: a tensor is missing, a size that no published network has, or a network that predicts variances; one
            sentence, of which the file is to be named by the caller.
    """
    try:
        network = network_config({name: tuple(value.shape) for name, value in tensors.items()})
    except (KeyError, IndexError) as error:
        raise ValueError(f"the tensors of an OpenAI U-Net are incomplete or misshapen: {error}") from None
    outputs, channels = network["out_channels"], network["in_channels"]
    if outputs != channels:
        raise ValueError(
            f"this OpenAI U-Net has {outputs} outputs for {channels} channels: a guided-diffusion network, which predicts "
            "noise and variances of discrete steps; can be read: the EDM teachers of consistency_models"
        )
    size = network["image_size"]
    return {
        "role": "teacher",
        "network": "OpenAIUNet",
        "network_config": network,
        "parameterization": PARAMETERIZATION.to_dict(),
        "sigma_data": SIGMA_DATA,
        "sample_shape": [channels, size, size],
        "num_classes": network.get("num_classes"),
        "label_format": "index",
    }


def network_config(shapes: dict[str, tuple[int, ...]]) -> dict:
    """The constructor's arguments from the shape of every tensor; ``dropout`` is left at its default."""
    ends = sorted(int(match[1]) for match in map(UPSAMPLING.fullmatch, shapes) if match)
    blocks = ends[0] if ends else 0
    # The first residual block of each level comes after a convolution, or after the resampling of the level before.
    first = [1 + level * (blocks + 1) for level in range(len(ends) + 1)]
    widths = [shapes[f"input_blocks.{i}.0.out_layers.0.weight"][0] for i in first]
    channels = shapes["time_embed.0.weight"][1]
    mult = next((mult for mult in IMAGE_SIZES if widths == [int(channels * m) for m in mult]), None)
    if mult is None:
        known = "; ".join(f"{', '.join(map(str, mult))} ({size} px)" for mult, size in IMAGE_SIZES.items())
        raise ValueError(
            f"an OpenAI U-Net of widths {', '.join(map(str, widths))} is of no published image size: allowed are {channels} "
            f"times {known}"
        )
    size = IMAGE_SIZES[mult]
    classes = {"num_classes": shapes["label_emb.weight"][0]} if "label_emb.weight" in shapes else {}
    return {
        **classes,
        "image_size": size,
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "num_channels": channels,
        "num_res_blocks": blocks,
        "channel_mult": list(mult),
        "attention_resolutions": [size >> k for k, i in enumerate(first) if f"input_blocks.{i}.1.qkv.weight" in shapes],
        "num_head_channels": CHANNELS_PER_HEAD,
        "use_scale_shift_norm": shapes["input_blocks.1.0.emb_layers.1.weight"][0] == 2 * widths[0],
        "resblock_updown": f"input_blocks.{blocks + 1}.0.op.weight" not in shapes,
        "legacy_attention": len(shapes["middle_block.1.qkv.weight"]) == 3,
    }
