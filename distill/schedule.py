"""When and from which seeds a consistency model samples. Exported pipelines carry this file."""

import math
from itertools import pairwise

import torch

from distill.trigflow import max_time

# Times after t_max for each number of steps, in radians. The paper uses 1.1 for two steps; the others follow
# few-step practice (SANA-Sprint, rCM): dense where the image is decided.
INTERMEDIATE_TIMES = {
    1: [],
    2: [1.1],
    3: [1.3, 0.8],
    4: [1.3, 1.1, 0.6],
    5: [1.4, 1.2, 0.9, 0.5],
    6: [1.45, 1.3, 1.1, 0.8, 0.4],
    7: [1.45, 1.35, 1.2, 1.0, 0.7, 0.4],
    8: [1.5, 1.4, 1.3, 1.1, 0.9, 0.6, 0.3],
}


def sample_seeds(num: int, generator: torch.Generator) -> list[int]:
    """One seed per sample. Seed ``i`` does not depend on ``num``, so neither does sample ``i``."""
    return torch.randint(0, 2**63 - 1, (num,), generator=generator).tolist()


def student_times(num_inference_steps: int, sigma_data: float, intermediate: list[float] | None = None) -> list[float]:
    """Sampling times of a consistency model, in radians, decreasing from ``t_max = arctan(80 / sigma_data)``.

    Args:
        num_inference_steps: 1 to 8.
        intermediate: the times after ``t_max``; by default :data:`INTERMEDIATE_TIMES`.

    Raises:
        ValueError: a number of steps outside 1 to 8, or times that do not decrease between ``t_max`` and 0.
    """
    if num_inference_steps not in INTERMEDIATE_TIMES:
        raise ValueError(f"num_inference_steps must be 1 to {max(INTERMEDIATE_TIMES)}, got {num_inference_steps}")
    middle = INTERMEDIATE_TIMES[num_inference_steps] if intermediate is None else list(intermediate)
    times = [max_time(sigma_data), *middle]
    if len(times) != num_inference_steps:
        raise ValueError(f"{num_inference_steps} steps need {num_inference_steps - 1} intermediate times, got {middle}")
    check_times(times)
    return times


def check_times(times: list[float]) -> None:
    decreasing = all(a > b for a, b in pairwise(times))
    if not (times and decreasing and 0 < times[-1] and times[0] <= math.pi / 2):
        raise ValueError(f"sampling times must decrease within (0, pi/2], got {times}")
