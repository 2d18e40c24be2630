"""Adapters: pretrained diffusion and flow-matching networks seen as TrigFlow networks."""

from teachers.base import Teacher, wrap
from teachers.parameterization import (
    DIT,
    EDM,
    EDM_DENOISER,
    PRESETS,
    RECTIFIED_FLOW,
    SIT,
    TRIGFLOW,
    VP_EPS,
    VP_V,
    VP_X0,
    Parameterization,
)
from teachers.pretrained import bundled, inspect, load, load_config, save_pretrained
from teachers.probe import probe
from teachers.registration import register

__all__ = [
    "DIT", "EDM", "EDM_DENOISER", "PRESETS", "RECTIFIED_FLOW", "SIT", "TRIGFLOW", "VP_EPS", "VP_V", "VP_X0",
    "Parameterization", "Teacher", "bundled", "inspect", "load", "load_config", "probe", "register",
    "save_pretrained", "wrap",
]  # fmt: skip
