"""scm-distill: pretrained diffusion and flow-matching models into continuous-time consistency models."""

from distill.model import Model, from_pretrained

__all__ = ["Model", "from_pretrained"]
