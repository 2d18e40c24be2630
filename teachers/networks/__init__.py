"""Our own definitions of the networks that released checkpoints use."""

import inspect

from torch import nn

from teachers.networks.dhariwal_unet import DhariwalUNet
from teachers.networks.diffusers_networks import DiffusersDiT, DiffusersUNet2D
from teachers.networks.diffusers_text import DiffusersText
from teachers.networks.edm2_unet import EDM2UNet
from teachers.networks.lightning_dit import LightningDiT
from teachers.networks.openai_unet import OpenAIUNet
from teachers.networks.sit import SiT
from teachers.networks.song_unet import SongUNet
from teachers.networks.trigflow_time import use_trigflow_time

NETWORKS: dict[str, type[nn.Module]] = {
    cls.__name__: cls
    for cls in (
        SongUNet, DhariwalUNet, EDM2UNet, SiT, LightningDiT, OpenAIUNet, DiffusersUNet2D, DiffusersDiT, DiffusersText,
    )
}  # fmt: skip
OURS = frozenset(NETWORKS.values())  # the rest are users' own, by teachers.register


def build(name: str, config: dict) -> nn.Module:
    """A registered network from its constructor arguments, which it keeps as ``.config``.

    Every network takes one argument more: ``trigflow_time: true`` for the time embedding of
    :func:`teachers.networks.trigflow_time.use_trigflow_time`.

    Raises:
        ValueError: an unknown network, or an argument it does not take or cannot use; one sentence.
    """
    if name not in NETWORKS:
        hint = "a class of your own is known once the module that registers it (teachers.register) is imported"
        raise ValueError(f"network is {name!r}; allowed: {', '.join(NETWORKS)}; {hint}")
    if not isinstance(config, dict):
        raise ValueError(f"{name} needs a mapping of constructor arguments, got {config!r}")
    own = {key: value for key, value in config.items() if key != "trigflow_time"}
    arguments = inspect.signature(NETWORKS[name]).parameters
    for key in own:
        if key not in arguments:
            raise ValueError(f"{name} has no argument {key!r}; it takes: {', '.join(arguments)}")
    try:
        network = NETWORKS[name](**own)
        if config.get("trigflow_time"):
            use_trigflow_time(network)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{name} cannot be built from its config: {str(error).splitlines()[0]}") from error
    network.config = dict(config)
    return network


def is_registered(network: nn.Module) -> bool:
    """Whether ``network`` came from :func:`build`, or is of a class that was registered before, so that it can be saved and
    built again.
    """
    return type(network) in NETWORKS.values() and hasattr(network, "config")


def is_ours(network: nn.Module) -> bool:
    """Whether this is a network of this package: it takes its time in fp64, and can be built on the meta device."""
    return type(network) in OURS
