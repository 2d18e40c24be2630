"""Pictures: sample grids and training curves."""

import json
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from teachers.pretrained import write_atomically


def to_uint8(images: Tensor) -> np.ndarray:
    """``(N, C, H, W)`` in [-1, 1] as uint8 ``(N, H, W, C)``."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return rearrange(pixels, "n c h w -> n h w c").cpu().numpy()


def visible(images: Tensor) -> Tensor:
    """Images as they are; of latents, whose channels are no colours, the first three channels or the first one, and of
    videos their first frame.
    """
    images = images[:, :, 0] if images.ndim == 5 else images
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1]


def to_pil(pixels: np.ndarray) -> Image.Image:
    """uint8 ``(H, W, C)`` with one or three channels as a picture."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def save_grid(rows: list[Tensor], path: Path, scale: int = 2, padding: int = 1) -> None:
    """Rows of images ``(N, C, H, W)`` in [-1, 1] as one PNG, ``scale`` screen pixels a pixel; rows may differ in length."""
    border = ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0))
    cells = [np.pad(to_uint8(visible(row)), border, constant_values=64) for row in rows]
    columns = max(len(row) for row in cells)
    full = [np.pad(row, ((0, columns - len(row)), (0, 0), (0, 0), (0, 0)), constant_values=64) for row in cells]
    grid = np.concatenate([rearrange(row, "n h w c -> h (n w) c") for row in full])
    picture = to_pil(grid.repeat(scale, 0).repeat(scale, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: picture.save(temporary, format="png"))


def labelled_grid(rows: dict[str, Tensor], path: Path, title: str) -> None:
    """One labelled row of images ``(N, C, H, W)`` in [-1, 1] a model, as a figure."""
    save_strips({name: to_uint8(visible(images)) for name, images in rows.items()}, path, title)


def save_strips(rows: dict[str, np.ndarray], path: Path, title: str) -> None:
    """One labelled row of images, uint8 ``(N, H, W, C)``, a model, as a figure."""
    plt = pyplot()
    height, width = next(iter(rows.values())).shape[1:3]
    columns = max(len(images) for images in rows.values())
    figure, axes = plt.subplots(len(rows), 1, figsize=(0.55 * columns + 2.2, 0.62 * len(rows) + 0.6), squeeze=False)
    for axis, (name, images) in zip(axes[:, 0], rows.items(), strict=True):
        strip = rearrange(images, "n h w c -> h (n w) c")
        axis.imshow(strip.squeeze(-1) if strip.shape[-1] == 1 else strip, cmap="gray", interpolation="nearest")
        axis.set_xticks(np.arange(1, columns) * width - 0.5, [])
        axis.set_yticks([height / 2], [name], fontsize=8)
        axis.tick_params(length=0)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(h_pad=0.1)
    save_figure(figure, path, bbox_inches="tight")


CURVES = {
    "loss": "loss", "tangent_norm": "tangent norm", "grad_norm": "gradient norm", "lr": "learning rate",
}  # fmt: skip


def plot_curves(log: Path, path: Path) -> None:
    """Training curves from a JSONL log: each logged series, and the endpoint error by time."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    plt = pyplot()
    figure, axes = plt.subplots(2, 3, figsize=(14, 6))
    distance = next((key for line in lines for key in line if key.startswith("frechet_distance/")), "frechet_distance/2")
    titles = CURVES | {distance: f"Fréchet distance, evaluations: {distance.split('/')[1]}"}
    for axis, (key, title) in zip(axes.flat[: len(titles)], titles.items(), strict=True):
        points = [(line["step"], line[key]) for line in lines if key in line]
        few = "o" if len(points) < 3 else None  # a line through one point is invisible
        axis.plot(*zip(*points, strict=True) if points else ([], []), linewidth=1, marker=few)
        largest = [(line["step"], line[f"largest_{key}"]) for line in lines if f"largest_{key}" in line]
        if largest:
            axis.plot(*zip(*largest, strict=True), linewidth=0.5, alpha=0.6, label="largest between two points")
            axis.legend(fontsize=7)
        axis.set(title=title, xlabel="step")
        values = [value for _, value in points + largest]
        if key.endswith("norm") and values and 0 < min(values) < max(values) / 100:
            axis.set_yscale("log")  # a spike would hide all the rest
    plot_endpoint_error(axes[1, 2], lines)
    # A fixed layout: matplotlib takes twice as long to find one as to draw, and this is drawn at every validation.
    figure.subplots_adjust(left=0.045, right=0.985, bottom=0.075, top=0.945, wspace=0.2, hspace=0.32)
    save_figure(figure, path)


def plot_endpoint_error(axis, lines: list[dict]) -> None:
    keys = sorted({key for line in lines for key in line if key.startswith("endpoint_error/")})
    for key, marker in zip(keys, "osv^Dx", strict=False):
        points = [(line["step"], line[key]) for line in lines if key in line]
        axis.plot(*zip(*points, strict=True), marker=marker, markersize=4, label="t = " + key.split("/")[1])
    axis.set(title="endpoint error (units of sigma_data)", xlabel="step")
    if keys:
        axis.set_yscale("log")
        axis.legend(fontsize=7)


def pyplot():
    import matplotlib  # slow to import, and only pictures need it

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    return plt


def save_figure(figure, path: Path, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120, **options))
    pyplot().close(figure)
