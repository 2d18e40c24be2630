"""Our own definitions of the networks that released checkpoints use."""

import inspect
from collections.abc import Callable

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
        wanted, fits = kind_of(arguments[key])
        if NETWORKS[name] in OURS and not fits(own[key]):
            raise ValueError(f"{name}: {key} must be {wanted}, got {own[key]!r}")
    try:
        network = NETWORKS[name](**own)
        if config.get("trigflow_time"):
            use_trigflow_time(network)
    except ZeroDivisionError as error:
        raise ValueError(f"{name} cannot be built from its config: an argument is 0 that must not be") from error
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{name} cannot be built from its config: {str(error).splitlines()[0]}") from error
    network.config = dict(config)
    return network


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# What an argument may be, by its type: in words, and the test.
KINDS: dict[type, tuple[str, Callable]] = {
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("a whole number", lambda value: isinstance(value, int) and is_number(value) and value >= 0),
    float: ("a number", is_number),
    str: ("a word", lambda value: isinstance(value, str)),
    dict: ("a mapping", lambda value: isinstance(value, dict)),
    tuple: ("a list of numbers", lambda value: isinstance(value, list | tuple) and all(map(is_number, value))),
}


def kind_of(argument: inspect.Parameter) -> tuple[str, Callable]:
    """What an argument of our networks may be: of its annotation's type; else of its default's, or ``None``; else a size."""
    if argument.annotation is not argument.empty:
        return KINDS[argument.annotation]
    if argument.default is argument.empty:
        return KINDS[int]
    wanted, fits = KINDS.get(type(argument.default), ("", lambda value: True))
    return wanted, lambda value: value is None or fits(value)


def is_registered(network: nn.Module) -> bool:
    """Whether ``network`` came from :func:`build`, or is of a class that was registered before, so that it can be saved and
    built again.
    """
    return type(network) in NETWORKS.values() and hasattr(network, "config")


def is_ours(network: nn.Module) -> bool:
    """Whether this is a network of this package: it takes its time in fp64, and can be built on the meta device."""
    # A network in shards is of a class that FSDP2 made of its own, which stands at this place of its ancestors.
    return type(network).__mro__[getattr(type(network), "_orig_cls_mro_index", 0)] in OURS
