"""The networks of released EDM and EDM2 checkpoints by the checkpoints' names, for planning without the files.

Constructor arguments from arXiv 2206.00364 (appendix F) and arXiv 2312.02696 (table 6); what a file itself says is in its
own pickle, which :mod:`teachers.nvlabs` reads.
"""

import re
from pathlib import PurePath

from teachers.parameterization import EDM

EDM2_CHANNELS = {"xxs": 64, "xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}
# Data set of an EDM name -> resolution, classes if conditional, channel_mult.
EDM_DATA = {
    "cifar10-32x32": (32, 10, [2, 2, 2]), "ffhq-64x64": (64, None, [1, 2, 2, 2]), "afhqv2-64x64": (64, None, [1, 2, 2, 2]),
}  # fmt: skip
EDM_ARCHITECTURES = {  # ending of an EDM name -> what it has beside DDPM++'s defaults
    "vp": {},
    "ve": {
        "embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1],
    },
}  # fmt: skip


def released_config(source: str) -> dict | None:
    """``config.json`` as a value for a name such as ``edm2-img512-s``, ``edm2-img512-xs-uncond-2147483-0.130.pkl`` or
    ``edm-cifar10-32x32-uncond-vp``, whatever folder is in front; ``None`` for any other name.
    """
    name = PurePath(source).name
    if match := re.match(r"edm2-img(64|512)-(xxs|xs|s|m|l|xl|xxl)(-uncond)?(-|$)", name):
        data, size, uncond = match.group(1, 2, 3)
        return edm2_config(4 if data == "512" else 3, EDM2_CHANNELS[size], None if uncond else 1000)
    if name.startswith("edm-imagenet-64x64-cond-adm"):
        config = {"img_resolution": 64, "in_channels": 3, "out_channels": 3, "label_dim": 1000}
        return as_config("DhariwalUNet", config, 3, 64, 1000)
    if match := re.match(rf"edm-({'|'.join(EDM_DATA)})-(cond|uncond)-(vp|ve)", name):
        data, condition, architecture = match.groups()
        return edm_config(*EDM_DATA[data], condition == "cond", architecture)
    return None


def edm2_config(channels: int, width: int, classes: int | None) -> dict:
    config = {"img_resolution": 64, "img_channels": channels, "label_dim": classes or 0, "model_channels": width}
    return as_config("EDM2UNet", config, channels, 64, classes)


def edm_config(size: int, classes: int | None, channel_mult: list[int], conditional: bool, architecture: str) -> dict:
    classes = classes if conditional else None
    config = {
        "img_resolution": size, "in_channels": 3, "out_channels": 3, "label_dim": classes or 0, "augment_dim": 9,
        "channel_mult": channel_mult, **EDM_ARCHITECTURES[architecture],
    }  # fmt: skip
    return as_config("SongUNet", config, 3, size, classes)


def as_config(network: str, config: dict, channels: int, size: int, classes: int | None) -> dict:
    return {
        "role": "teacher", "network": network, "network_config": config, "parameterization": EDM.to_dict(),
        "sigma_data": 0.5, "sample_shape": [channels, size, size], "num_classes": classes, "label_format": "one_hot",
    }  # fmt: skip
