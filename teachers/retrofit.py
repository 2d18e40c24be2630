"""Giving a network a time embedding that a consistency model can be differentiated through (arXiv 2410.11081, 4.1).

EDM2, NCSN++ and transformers with times up to 1000 embed the time by fast oscillations, whose derivative would swamp a
student's tangent. The new embedding first imitates the old one as far as a smooth function can; training towards the
frozen network's velocity (objective ``retrofit``) does the rest.
"""

import copy
import dataclasses

import torch
from torch import Tensor

from teachers.base import Teacher
from teachers.networks import build, is_registered
from teachers.networks.trigflow_time import TrigFlowTime, time_embeddings

NUM_TIMES, RIDGE = 4000, 1e-4  # a smaller penalty fits better and turns faster


def retrofit(teacher: Teacher) -> Teacher:
    """A trainable copy of ``teacher`` whose time embedding is a smooth function of the TrigFlow time.

    Raises:
        ValueError: a network that is not one of ours, or one that has been through this already.
    """
    native = teacher.native
    if not is_registered(native) or not time_embeddings(native):
        raise ValueError(f"{type(native).__name__} is not one of our networks: its time embedding cannot be replaced")
    if native.config.get("trigflow_time"):
        raise ValueError(f"{teacher.source or 'this network'} has a smooth time embedding already")
    smooth = build(type(native).__name__, {**native.config, "trigflow_time": True})
    old, new = time_embeddings(native), time_embeddings(smooth)
    replaced = tuple(f"{name}." for name in old)
    kept = {key: value for key, value in native.state_dict().items() if not key.startswith(replaced)}
    smooth.load_state_dict({**smooth.state_dict(), **kept})
    t = training_times(teacher.sigma_data)
    signal = teacher.parameterization.coefficients(t, teacher.sigma_data).time
    for name, embedding in new.items():
        fit(embedding, t, copy.deepcopy(old[name]).cpu()(signal).detach())
    convention = dataclasses.replace(teacher.parameterization, time="trigflow", time_scale=1.0, schedule=None)
    return teacher.twin(
        native=smooth, parameterization=convention, guidance_scale=1.0, guidance_interval=None, guidance_teacher=None
    )


def training_times(sigma_data: float) -> Tensor:
    """Times equally spaced in ``log tan t``, from noise level 0.002 to 80, fp64."""
    low, high = (torch.tensor(sigma / sigma_data, dtype=torch.float64).log().item() for sigma in (0.002, 80.0))
    return torch.linspace(low, high, NUM_TIMES, dtype=torch.float64).exp().atan()


def fit(embedding: TrigFlowTime, t: Tensor, target: Tensor) -> None:
    """Set the linear layer by ridge regression of ``target`` ``(N, dim)`` at times ``t`` ``(N,)``."""
    features = embedding.embedding(t)
    mean, centre = features.mean(0), target.mean(0)
    x, y = features - mean, target - centre
    gram = x.T @ x / len(t) + RIDGE * torch.eye(x.shape[1], dtype=t.dtype)
    weight = torch.linalg.solve(gram, x.T @ y / len(t)).T
    embedding.linear.weight.data.copy_(weight)
    embedding.linear.bias.data.copy_(centre - weight @ mean)
