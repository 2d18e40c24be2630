"""Planning: what a recipe costs before anything is loaded."""

from distill.plan.memory import fit_to_device
from distill.plan.report import Hardware, as_text, plan

__all__ = ["Hardware", "as_text", "fit_to_device", "plan"]
