"""Networks whose weights are still to come, built in no time and in no more memory than the weights will take."""

import math

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Functions that make a tensor of a given size, and how many values beyond its weights (positions, frequencies) a network has
# at most.
MAKERS = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.arange)
TABLES = 2**22
LEAST = 1000  # values that a tensor counts as at least: a hundred thousand tiny ones take seconds to make


class Unfilled(TorchFunctionMode):
    """What would be drawn at random is left as memory holds it, and not many more than ``size`` values are made in all: with
    more, which a config can ask for whatever its weights are, a ``ValueError`` is raised before memory or patience end.
    """

    def __init__(self, size: int):
        super().__init__()
        self.left = 2 * size + TABLES

    def count(self, values: int) -> None:
        self.left -= max(values, LEAST)
        if self.left < 0:
            raise ValueError("its config describes a network far larger than its weights")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in MAKERS:
            sizes = kwargs.get("size", args)
            self.count(math.prod(n for size in sizes for n in (size if isinstance(size, tuple | list) else (size,))))
        if func is torch.cat:  # tables are made of expanded tensors
            self.count(sum(tensor.numel() for tensor in args[0]))
        if func in (Tensor.normal_, Tensor.uniform_) or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if func in (torch.rand, torch.randn) and "generator" not in kwargs:
            return torch.empty(*args, **kwargs)
        return func(*args, **kwargs)
