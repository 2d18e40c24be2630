"""Giving a network a time embedding that a consistency model can be differentiated through (arXiv 2410.11081, 4.1).

EDM2, NCSN++ and transformers with times up to 1000 embed the time by fast oscillations, whose derivative would swamp a
student's tangent. The new embedding first imitates the old one as far as a smooth function can; training towards the
frozen network's velocity (objective ``retrofit``) does the rest.

Transformers can get normalised queries and keys by the same route, without which large ones are trained unstably (5.1).
"""

import copy
import dataclasses
import inspect

import torch
from torch import Tensor, nn

from teachers.base import Teacher
from teachers.networks import build, is_registered
from teachers.networks.sit import Attention
from teachers.networks.trigflow_time import TrigFlowTime, time_embeddings

NUM_TIMES, RIDGE = 4000, 1e-4  # a smaller penalty fits better and turns faster


def retrofit(teacher: Teacher, qk_norm: bool = False) -> Teacher:
    """A trainable copy of ``teacher`` whose time embedding is a smooth function of the TrigFlow time.

    Args:
        qk_norm: also put a normalisation of queries and keys into the attention of a transformer. A teacher whose time is
            smooth already gets only this.

    Raises:
        ValueError: a network that cannot be changed so, or one that has been through this already.
    """
    native, name = teacher.native, teacher.source or "this network"
    if not is_registered(native) or not time_embeddings(native):
        raise ValueError(f"{type(native).__name__} is not one of our networks: its time embedding cannot be replaced")
    slow = not native.config.get("trigflow_time")
    if not slow and not qk_norm:
        raise ValueError(f"{name} has a smooth time embedding already")
    normalised = {qk_norm_argument(native): True} if qk_norm else {}
    changed = build(type(native).__name__, {**native.config, "trigflow_time": True, **normalised})
    copy_weights(native, changed, but=tuple(f"{key}." for key in time_embeddings(native)) if slow else ())
    convention = teacher.parameterization
    if slow:
        imitate_times(teacher, changed)
        convention = dataclasses.replace(convention, time="trigflow", time_scale=1.0, schedule=None)
    if qk_norm:
        imitate_scales(teacher, changed)
    return teacher.twin(
        native=changed, parameterization=convention, guidance_scale=1.0, guidance_interval=None, guidance_teacher=None
    )


def copy_weights(native: nn.Module, changed: nn.Module, but: tuple[str, ...]) -> None:
    """Give a changed network the weights of the old one, except for those whose names start as one of ``but``."""
    kept = {key: value for key, value in native.state_dict().items() if not (but and key.startswith(but))}
    changed.load_state_dict({**changed.state_dict(), **kept})


def imitate_times(teacher: Teacher, changed: nn.Module) -> None:
    """Fit every time embedding of ``changed`` to the teacher's."""
    t = training_times(teacher.sigma_data)
    signal = teacher.parameterization.coefficients(t, teacher.sigma_data).time
    old = time_embeddings(teacher.native)
    for name, embedding in time_embeddings(changed).items():
        fit(embedding, t, copy.deepcopy(old[name]).cpu()(signal).detach())


def qk_norm_argument(native: nn.Module) -> str:
    """The constructor argument that normalises queries and keys.

    Raises:
        ValueError: the network has none, or has it set.
    """
    found = [key for key in ("qk_norm", "use_qknorm") if key in inspect.signature(type(native)).parameters]
    if not found:
        raise ValueError(f"qk_norm is for SiT and LightningDiT: {type(native).__name__} has no such normalisation")
    if native.config.get(found[0]):
        raise ValueError(f"this {type(native).__name__} normalises its queries and keys already; remove qk_norm")
    return found[0]


@torch.no_grad()
def imitate_scales(teacher: Teacher, changed: nn.Module) -> None:
    """Set the scales of the new normalisations to the spread that queries and keys have in the teacher, at noise of every
    level: attention is then as sharp as it was in the mean.
    """
    old = {name: module for name, module in teacher.native.named_modules() if isinstance(module, Attention)}
    seen: dict[str, Tensor] = {}
    hooks = [
        module.qkv.register_forward_hook(lambda _, args, out, name=name: seen.update({name: out}))
        for name, module in old.items()
    ]
    device = next(teacher.native.parameters()).device
    t = training_times(teacher.sigma_data)[:: NUM_TIMES // 32]
    generator = torch.Generator().manual_seed(0)
    x_t = teacher.sigma_data * torch.randn(len(t), *teacher.sample_shape, generator=generator)
    try:
        teacher.evaluate(x_t.to(device), t.to(device), teacher.example_condition(len(t), device))
    finally:
        for hook in hooks:
            hook.remove()
    for name in old:
        new = changed.get_submodule(name)
        parts = seen[name].unflatten(-1, (3, -1))[..., :2, :].square().mean(dim=(0, 1, 3)).sqrt()
        for norm, scale in zip((new.q_norm, new.k_norm), parts.tolist(), strict=True):
            norm.weight.data.fill_(scale)


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
