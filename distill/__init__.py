"""scm-distill: pretrained diffusion and flow-matching models into continuous-time consistency models."""

__all__ = ["Model", "from_pretrained"]


def __getattr__(name: str):
    """``Model`` and ``from_pretrained`` when they are first used: torch takes seconds to import, and ``distill --help`` does
    without.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from distill import model

    return getattr(model, name)
