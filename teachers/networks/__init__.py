"""Our own definitions of the networks that released checkpoints use."""

import inspect

from torch import nn

from teachers.networks.dhariwal_unet import DhariwalUNet
from teachers.networks.edm2_unet import EDM2UNet
from teachers.networks.openai_unet import OpenAIUNet
from teachers.networks.sit import SiT
from teachers.networks.song_unet import SongUNet

NETWORKS: dict[str, type[nn.Module]] = {
    cls.__name__: cls for cls in (SongUNet, DhariwalUNet, EDM2UNet, SiT, OpenAIUNet)
}


def build(name: str, config: dict) -> nn.Module:
    """A registered network from its constructor arguments, which it keeps as ``.config``.

    Raises:
        ValueError: an unknown network, or an argument it does not take or cannot use; one sentence.
    """
    if name not in NETWORKS:
        raise ValueError(f"network is {name!r}; allowed: {', '.join(NETWORKS)}")
    if not isinstance(config, dict):
        raise ValueError(f"{name} needs a mapping of constructor arguments, got {config!r}")
    arguments = inspect.signature(NETWORKS[name]).parameters
    for key in config:
        if key not in arguments:
            raise ValueError(f"{name} has no argument {key!r}; it takes: {', '.join(arguments)}")
    try:
        network = NETWORKS[name](**config)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{name} cannot be built from its config: {str(error).splitlines()[0]}") from error
    network.config = dict(config)
    return network


def is_registered(network: nn.Module) -> bool:
    """Whether ``network`` came from :func:`build`, so that it can be saved and built again."""
    return type(network) in NETWORKS.values() and hasattr(network, "config")
