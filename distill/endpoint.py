"""How far a network is from its teacher at a few images, without features: the endpoint error of a student, which is how far
``f(x_t, t)`` is from where the teacher's PF-ODE takes ``x_t``, and the velocity error of a network that is still a teacher.

The first shows divergence hundreds of steps before samples do.
"""

import torch
from torch import Tensor

from distill import trigflow
from distill.sampling import evaluation_mode, solve_ode
from teachers import Teacher
from teachers.condition import Condition

TIMES = (0.3, 0.8, 1.1, 1.3, 1.45, 1.53)
# Of Heun's method from each of them: all are within 0.002 sigma_data of twice as many for the bundled EDM teacher.
STEPS = (10, 16, 20, 26, 40, 40)


class EndpointError:
    """The error at fixed noisy images, at six times.

    Args:
        teacher: its PF-ODE is solved once, from every ``x_t``, by Heun's method.
        x0: real images ``(B, C, H, W)``; ``labels`` ``(B,)`` or ``None``.
        seed: of the noise.
    """

    def __init__(self, teacher: Teacher, x0: Tensor, labels: Condition | None, seed: int = 0):
        self.labels = labels
        generator = torch.Generator().manual_seed(seed)
        z = (teacher.sigma_data * torch.randn(x0.shape, generator=generator)).to(x0)
        self.noisy = {t: trigflow.perturb(x0, z, torch.tensor(t)).to(x0) for t in TIMES}
        starts = zip(self.noisy.items(), STEPS, strict=True)
        self.ends = {t: solve_ode(teacher, x, t, labels, steps) for (t, x), steps in starts}

    @torch.no_grad()
    def __call__(self, student: Teacher, guidance: float | None = None) -> dict[float, float]:
        """RMS of ``f(x_t, t)`` minus the end of the ODE, in units of sigma_data, by time."""
        errors = {}
        with evaluation_mode(student):
            for time, x_t in self.noisy.items():
                t = torch.full((len(x_t),), time, device=x_t.device)
                scale = None if guidance is None else torch.full_like(t, guidance)
                f = trigflow.consistency_function(x_t, student(x_t, t, self.labels, scale), t, student.sigma_data)
                errors[time] = (f - self.ends[time]).square().mean().sqrt().item() / student.sigma_data
        return errors


class VelocityError:
    """How far a network's velocity is from that of the teacher it learns from, at fixed noisy images and six times.

    Args:
        teacher: frozen; evaluated once.
        x0: real images ``(B, C, H, W)``; ``labels`` ``(B,)`` or ``None``.
        seed: of the noise.
    """

    def __init__(self, teacher: Teacher, x0: Tensor, labels: Condition | None, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        z = (teacher.sigma_data * torch.randn(x0.shape, generator=generator)).to(x0)
        self.labels = labels
        self.noisy = {t: trigflow.perturb(x0, z, torch.tensor(t)).to(x0) for t in TIMES}
        self.velocities = {t: self.velocity(teacher, t) for t in TIMES}

    @torch.no_grad()
    def velocity(self, network: Teacher, time: float) -> Tensor:
        x_t = self.noisy[time]
        with evaluation_mode(network):
            return network(x_t, torch.full((len(x_t),), time, device=x_t.device), self.labels)

    def __call__(self, network: Teacher) -> float:
        """``mean ||F - F_teacher||^2 / mean ||F_teacher||^2`` over all of them."""
        squared = sum((self.velocity(network, t) - F).square().mean() for t, F in self.velocities.items())
        return (squared / sum(F.square().mean() for F in self.velocities.values())).item()


def rising_at_small_t(history: list[dict[float, float]]) -> bool:
    """Whether the error at the smallest time is a fifth, and at least 1e-4 ``sigma_data``, above its best: the first sign of
    divergence.
    """
    errors = [errors[TIMES[0]] for errors in history]
    return len(errors) > 1 and errors[-1] > max(1.2 * min(errors), min(errors) + 1e-4)
