"""What the tensors of a DiT, SiT, REPA or LightningDiT checkpoint say about their network.

Names as in ``models.py`` of facebookresearch/DiT and willisma/SiT, ``models/sit.py`` of sihyun-yu/REPA and
``models/lightningdit.py`` of hustvl/LightningDiT. DiT and SiT have the same tensors and differ in what they mean.
"""

import math

from torch import Tensor

from teachers.parameterization import DIT, RECTIFIED_FLOW, SIT, Parameterization

# Every one of these networks has them.
TRUNK = {
    "x_embedder.proj.weight", "t_embedder.mlp.0.weight", "y_embedder.embedding_table.weight", "pos_embed",
    "blocks.0.attn.qkv.weight", "blocks.0.adaLN_modulation.1.weight", "final_layer.linear.weight",
}  # fmt: skip
LIGHTNING = {"blocks.0.mlp.w12.weight", "blocks.0.norm1.weight", "feat_rope.freqs_cos"}  # it has at least one
# (hidden_size, depth) -> heads of the published sizes S, B, L, XL, 1p0B and 1p6B. Shapes do not tell them.
HEADS = {(384, 12): 6, (768, 12): 12, (1024, 24): 16, (1152, 28): 16, (1536, 24): 24, (1792, 28): 28}


def is_sit(tensors: dict[str, Tensor]) -> bool:
    """SiT or DiT: the same names."""
    return has_plain_blocks(tensors) and not is_trained_by_repa(tensors)


def is_repa(tensors: dict[str, Tensor]) -> bool:
    """REPA, or what may be one without its projectors: its head never has a second half."""
    return has_plain_blocks(tensors) and not learns_sigma(tensors)


def is_lightning_dit(tensors: dict[str, Tensor]) -> bool:
    return tensors.keys() >= TRUNK and bool(tensors.keys() & LIGHTNING)


def has_plain_blocks(tensors: dict[str, Tensor]) -> bool:
    return tensors.keys() >= TRUNK | {"blocks.0.mlp.fc1.weight"} and not tensors.keys() & LIGHTNING


def is_trained_by_repa(tensors: dict[str, Tensor]) -> bool:
    return any(key.startswith("projectors.") for key in tensors)


def learns_sigma(tensors: dict[str, Tensor]) -> bool:
    """Whether the head has twice as many outputs as the patches have inputs."""
    return len(tensors["final_layer.linear.weight"]) == 2 * tensors["x_embedder.proj.weight"][0].numel()


def repa_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the SiT inside: without projectors, and in one row of blocks where an old file has two."""
    first = len({key.split(".")[1] for key in tensors if key.startswith("blocks.")})
    ours = {}
    for key, value in tensors.items():
        if key.startswith("decoder_blocks."):
            _, index, rest = key.split(".", 2)
            key = f"blocks.{first + int(index)}.{rest}"
        if not key.startswith("projectors."):
            ours[key] = value
    return ours


def sit_config(tensors: dict[str, Tensor]) -> dict:
    """``x0 - eps``, time 1 is data."""
    return plain_config(tensors, SIT)


def dit_config(tensors: dict[str, Tensor]) -> dict:
    """``eps`` at DDPM's steps."""
    return plain_config(tensors, DIT)


def repa_config(tensors: dict[str, Tensor]) -> dict:
    """``eps - x0``, time 1 is noise: the other way round than SiT."""
    return plain_config(tensors, RECTIFIED_FLOW)


def plain_config(tensors: dict[str, Tensor], parameterization: Parameterization) -> dict:
    own = {"mlp_ratio": mlp_ratio(tensors), "qk_norm": "blocks.0.attn.q_norm.weight" in tensors}
    return model_config("SiT", {**trunk_config(tensors), **own}, parameterization)


def lightning_dit_config(tensors: dict[str, Tensor]) -> dict:
    """``x0 - eps``, time 1 is data, as SiT."""
    trunk = trunk_config(tensors)
    own = {
        "mlp_ratio": mlp_ratio(tensors),
        "use_qknorm": "blocks.0.attn.q_norm.weight" in tensors,
        "use_swiglu": "blocks.0.mlp.w12.weight" in tensors,
        "use_rope": "feat_rope.freqs_cos" in tensors,
        "use_rmsnorm": "blocks.0.norm1.weight" in tensors,
        "wo_shift": len(tensors["blocks.0.adaLN_modulation.1.weight"]) == 4 * trunk["hidden_size"],
    }
    return model_config("LightningDiT", {**trunk, **own}, SIT)


def trunk_config(tensors: dict[str, Tensor]) -> dict:
    """Constructor arguments that all of them share; ``num_heads`` is ``None`` where the file does not say."""
    hidden, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    depth = len({key.split(".")[1] for key in tensors if key.startswith("blocks.")})
    return {
        "input_size": math.isqrt(tensors["pos_embed"].shape[1]) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": hidden,
        "depth": depth,
        "num_heads": num_heads(tensors, hidden, depth),
        "num_classes": len(tensors["y_embedder.embedding_table.weight"]) - 1,  # the last row is the null class
        "learn_sigma": learns_sigma(tensors),
    }


def num_heads(tensors: dict[str, Tensor], hidden: int, depth: int) -> int | None:
    """From a tensor of the size of one head if there is one, else as published for this size."""
    for key in ("blocks.0.attn.q_norm.weight", "feat_rope.freqs_cos"):
        if key in tensors:
            return hidden // tensors[key].shape[-1]
    return HEADS.get((hidden, depth))


def mlp_ratio(tensors: dict[str, Tensor]) -> float:
    hidden = len(tensors["x_embedder.proj.weight"])
    if "blocks.0.mlp.fc1.weight" in tensors:
        return len(tensors["blocks.0.mlp.fc1.weight"]) / hidden
    width = tensors["blocks.0.mlp.w3.weight"].shape[1]  # two thirds of an MLP's, rounded down
    return 4.0 if width == int(2 / 3 * 4 * hidden) else 1.5 * width / hidden


def model_config(network: str, network_config: dict, parameterization: Parameterization) -> dict:
    """``config.json`` as a value, for latents of unit variance."""
    size = network_config["input_size"]
    return {
        "role": "teacher",
        "network": network,
        "network_config": network_config,
        "parameterization": parameterization.to_dict(),
        "sigma_data": 1.0,
        "sample_shape": [network_config["in_channels"], size, size],
        "num_classes": network_config["num_classes"],
        "label_format": "index",
    }
