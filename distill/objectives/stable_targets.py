"""Targets of the diffusion loss averaged over a whole data set instead of the one image that was noised."""

import torch
from torch import Tensor

from distill.transfer import to_device
from distill.trigflow import expand


class StableTargets:
    """``E[x0 | x_t, label]`` when the data are exactly a finite set of images (stable target field, arXiv 2302.00670).

    The diffusion loss has the same minimiser with this mean in place of ``x0``, and the same gradient on average, but at
    large ``t`` far less noise: there many images could have become ``x_t``. At small ``t`` the mean is ``x0`` itself.

    Args:
        images: the data ``(N, C, H, W)``; one product with all of them is taken per step.
        labels: ``(N,)`` integers in the host's memory, or ``None``. The label ``num_classes`` stands for every class.
    """

    def __init__(self, images: Tensor, labels: Tensor | None, num_classes: int | None, sigma_data: float):
        self.sigma_data, self.num_classes = sigma_data, num_classes
        order = torch.arange(len(images)) if labels is None else labels.argsort(stable=True)
        self.images = images.flatten(1)[order.to(images.device)]
        self.squares = self.images.square().sum(1)
        counts = [len(images)] if labels is None else torch.bincount(labels, minlength=num_classes).tolist()
        ends = torch.tensor(counts).cumsum(0).tolist()
        self.ranges = [slice(end - count, end) for count, end in zip(counts, ends, strict=True)]

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """The posterior means ``(B, C, H, W)`` for ``x_t`` ``(B, C, H, W)``, times ``(B,)`` and labels ``(B,)``.

        The labels, which decide what is computed, are in the host's memory: nothing waits for the device.
        """
        means = torch.empty_like(x_t)
        classes = [0] * len(x_t) if labels is None else labels.tolist()
        for label in sorted(set(classes)):
            rows = to_device(torch.tensor([i for i, c in enumerate(classes) if c == label]), x_t.device)
            every = labels is not None and label == self.num_classes
            means[rows] = self.mean(x_t[rows], t[rows], slice(None) if every else self.ranges[label])
        return means

    def mean(self, x_t: Tensor, t: Tensor, span: slice) -> Tensor:
        images = self.images[span].to(x_t)
        x = (x_t / expand(t.cos(), x_t)).flatten(1)  # x0 + sigma eps
        sigma = (self.sigma_data * t.tan())[:, None]
        # -||x - x0||^2 / (2 sigma^2), without the term that all images share.
        logits = (x @ images.T - self.squares[span].to(x_t) / 2) / sigma.square()
        return (logits.softmax(1) @ images).view_as(x_t)
