"""Network classes of the user's own in the registry, so that models of them are saved, loaded and exported like ours."""

import functools
import inspect
import json
import math

from torch import nn

from teachers.networks import NETWORKS

# Registered class -> name and text of the file that defines it. Taken at once: the file may be edited during a training.
SOURCES: dict[type[nn.Module], tuple[str, str]] = {}


def register(cls: type[nn.Module]) -> type[nn.Module]:
    """Enter a network class of your own under its name; the class comes back, so this is a decorator too.

    Every network of the class that is made afterwards, however it is called, keeps its constructor arguments, plain defaults
    included, as ``.config`` and can be built again from them. They must be plain: numbers, strings, booleans, ``None``, or
    lists and dicts of those (a tuple is kept as a list). Where a saved model is loaded, the module that registers its class
    must have been imported.

    >>> @teachers.register
    ... class MixerScore(nn.Module): ...

    Raises:
        ValueError: no class of networks; another class has the name; a constructor that does not name its arguments. And
            when a network is made: an argument that is not plain; a network with a ``config`` of its own.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(f"register takes a class of networks (torch.nn.Module), got {cls!r}")
    known = NETWORKS.get(cls.__name__)
    if known is cls:
        return cls
    if known is not None and full_name(known) != full_name(cls):  # the same name: defined anew, as in a notebook
        raise ValueError(f"the name {cls.__name__} is taken by {full_name(known)}; give {full_name(cls)} another one")
    check_constructor(cls)
    record_arguments(cls)
    NETWORKS[cls.__name__] = cls
    if (source := source_of(cls)) is not None:
        SOURCES[cls] = source
    return cls


def full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def check_constructor(cls: type[nn.Module]) -> None:
    """Raise ``ValueError`` unless every argument has a name by which :func:`teachers.networks.build` can give it."""
    for p in list(inspect.signature(cls.__init__).parameters.values())[1:]:
        if p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
            raise ValueError(f"{cls.__name__} cannot be registered: its constructor takes {p}, which no keyword can give")
        if p.name == "trigflow_time":
            raise ValueError(f"{cls.__name__} cannot be registered: every network has an argument trigflow_time already")


def record_arguments(cls: type[nn.Module]) -> None:
    """Make the constructor of ``cls`` keep its arguments; that of a subclass, which calls it, keeps its own or none."""
    original = cls.__init__
    signature = inspect.signature(original)
    # They may be edited before the model is loaded again.
    defaults = {p.name: plain(p.default, p.name) for p in signature.parameters.values() if is_plain(p.default)}

    @functools.wraps(original)
    def recording(self, *args, **kwargs):
        if type(self) is not cls:
            return original(self, *args, **kwargs)
        given = list(signature.bind(self, *args, **kwargs).arguments.items())[1:]
        config = {**defaults, **{name: plain(value, f"{cls.__name__}: {name}") for name, value in given}}
        original(self, *args, **kwargs)
        if hasattr(self, "config"):
            raise ValueError(f"{cls.__name__} has an attribute config, where its arguments would be kept; rename it")
        self.config = config

    cls.__init__ = recording


def plain(value, where: str):
    """``value`` as JSON gives it back.

    Raises:
        ValueError: what JSON does not have.
    """
    if not is_plain(value):
        allowed = "numbers, strings, None, lists or dicts of them"
        raise ValueError(f"{where} must be plain to be saved ({allowed}), got {value!r}")
    return json.loads(json.dumps(value))


def is_plain(value) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(v) for key, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))


def source_of(cls: type) -> tuple[str, str] | None:
    """Name and text of the file that defines a class; ``None`` if no file does (a notebook, an interactive session)."""
    try:
        return inspect.getsourcefile(cls), inspect.getsource(inspect.getmodule(cls))
    except (OSError, TypeError):
        return None
