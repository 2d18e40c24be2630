"""Optimizers and the course of the learning rate."""

import math

import torch
from torch import nn

from distill.recipe import OptimizerConfig

# Each with its fastest implementation, which PyTorch does not choose by itself on a CPU: there RAdam then takes half of the
# time, and Adam a quarter (55.7M parameters, torch 2.13).
KINDS = {
    "radam": (torch.optim.RAdam, {"foreach": True}),
    "adam": (torch.optim.Adam, {"fused": True}),
    "adamw": (torch.optim.AdamW, {"fused": True}),
}


def build_optimizer(config: OptimizerConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    kind, implementation = KINDS[config.name]
    values = dict(lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.epsilon)
    return kind(parameters, weight_decay=config.weight_decay, **values, **implementation)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """The learning rate of the step after ``step`` steps."""
    warmup = min(1.0, (step + 1) / config.lr_warmup_steps) if config.lr_warmup_steps else 1.0
    decay = {
        "constant": 1.0,
        "linear": 1 - step / max_steps,
        "inverse_sqrt": 1 / math.sqrt(max(step / config.lr_reference_steps, 1)),
    }
    return config.learning_rate * warmup * decay[config.lr_scheduler]
