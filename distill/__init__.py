"""scm-distill: pretrained diffusion and flow-matching models into continuous-time consistency models."""

from importlib import import_module

# What is imported when it is first used, and from where: torch takes seconds, and ``distill --help`` does without.
PUBLIC = {"Model": "distill.model", "compare": "distill.comparison", "from_pretrained": "distill.model"}
__all__ = ["Model", "compare", "from_pretrained"]


def __getattr__(name: str):
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name]), name)
