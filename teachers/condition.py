"""What a network is told of each sample besides its time: a class, or what a text encoder made of a prompt."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Embeddings:
    """Prompts as their text encoder left them: named tensors with one row a sample, such as ``encoder_hidden_states``
    ``(B, L, D)``, ``encoder_attention_mask`` ``(B, L)`` or ``pooled_projections`` ``(B, D)``.

    They stand wherever a class-conditional network has its labels ``(B,)``, and are indexed and moved like them.

    Raises:
        ValueError: no tensors, or tensors of different batch sizes.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        sizes = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"text embeddings must be tensors with one row a sample, as many in each; got {sizes}")
        self.tensors = dict(tensors)

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: slice | Tensor) -> "Embeddings":
        """Those of some samples: a slice, a mask or indices."""
        return Embeddings({name: tensor[rows] for name, tensor in self.tensors.items()})

    def to(self, device=None, dtype: torch.dtype | None = None) -> "Embeddings":
        """On another device; ``dtype`` is for what is in floating point, masks stay what they are."""
        return Embeddings({
            name: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
            for name, tensor in self.tensors.items()
        })  # fmt: skip

    def expand(self, num: int) -> "Embeddings":
        """A single prompt for ``num`` samples."""
        return Embeddings({name: tensor.expand(num, *tensor.shape[1:]) for name, tensor in self.tensors.items()})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of one sample, by name."""
        return {name: tuple(tensor.shape[1:]) for name, tensor in self.tensors.items()}


Condition = Tensor | Embeddings  # classes ``(B,)``, or prompts


def join(first: Condition, second: Condition) -> Condition:
    """Two batches as one.

    Raises:
        ValueError: prompts that were embedded in different shapes.
    """
    if torch.is_tensor(first):
        return torch.cat([first, second])
    if first.shapes() != second.shapes():
        raise ValueError(f"text embeddings of shapes {first.shapes()} and {second.shapes()} do not go into one batch")
    return Embeddings({name: torch.cat([tensor, second.tensors[name]]) for name, tensor in first.tensors.items()})


def replace_rows(condition: Condition, rows: Tensor, by: Condition) -> Condition:
    """``condition`` with those of ``by``, another batch of as many, where the mask ``rows`` ``(B,)`` is set."""
    if torch.is_tensor(condition):
        return torch.where(rows, by, condition)
    index = torch.arange(len(rows), device=rows.device)
    return join(condition, by)[torch.where(rows, index + len(rows), index)]


Shapes = Mapping[str, tuple[int, ...]]  # of one prompt's embeddings, by name


def fits(shapes: Shapes, wanted: Shapes) -> bool:
    """Whether embeddings have the names and shapes that a network wants, but for the number of tokens."""
    return {name: per_token(name, shape) for name, shape in shapes.items()} == {
        name: per_token(name, shape) for name, shape in wanted.items()
    }


def per_token(name: str, shape: tuple[int, ...]) -> tuple[int | None, ...]:
    """A shape with the number of tokens left open, which everything but a pooled embedding ``(D,)`` has first."""
    return (None, *shape[1:]) if len(shape) > 1 or is_mask(name) else shape


def is_mask(name: str) -> bool:
    return name.endswith("mask")


def example_text(shapes: Shapes, num: int, device=None) -> Embeddings:
    """Embeddings of nothing in particular, unit noise that is not masked, to try a network out with."""
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(num, *shape, generator=generator) for name, shape in shapes.items()}
    return Embeddings({n: (torch.ones_like(x) if is_mask(n) else x).to(device) for n, x in made.items()})


def integer_labels(labels, name: str) -> Tensor:
    """An integer, or a list or tensor ``(B,)`` of them, as an int64 tensor; ``name`` is for the message.

    Raises:
        ValueError: something else, which torch would refuse in its own words or round, or nothing.
    """
    try:
        tensor = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):  # of many kinds, none of which says what is allowed
        tensor = torch.empty(0)
    whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    if tensor.numel() == 0 or tensor.ndim > 1 or not whole:
        raise ValueError(f"{name} must be an integer or a list of integers, got {labels!r}")
    return tensor.long()
