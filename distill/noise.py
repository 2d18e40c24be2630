"""Random numbers of a batch that is shared out over processes, the same however many there are."""

from collections.abc import Callable

import torch
from torch import Tensor


class BatchGenerator(torch.Generator):
    """A CPU generator of the numbers of a whole batch, of which the process ``rank`` of ``world`` keeps its rows.

    Every process draws all of them and so stands at the same place of the stream. One process alone draws what an ordinary
    generator with this seed draws.
    """

    rank, world = 0, 1

    @classmethod
    def seeded(cls, seed: int, rank: int, world: int) -> "BatchGenerator":
        generator = cls()
        generator.manual_seed(seed)
        generator.rank, generator.world = rank, world
        return generator


def draw(function: Callable, shape: tuple[int, ...], generator: torch.Generator | None, **options) -> Tensor:
    """This process' ``shape`` of ``function``, such as ``torch.randn``: rows of what a :class:`BatchGenerator` draws for the
    whole batch; of an ordinary generator everything.
    """
    if not isinstance(generator, BatchGenerator):
        return function(shape, generator=generator, **options)
    rows = shape[0]
    whole = function((rows * generator.world, *shape[1:]), generator=generator, **options)
    return whole[rows * generator.rank : rows * (generator.rank + 1)]
