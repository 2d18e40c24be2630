"""The report's plots: one matplotlib figure each, as SVG for the page, which gives the text its colour, and as PNG.

Models differ in marker as well as in colour, numbers of steps in dashes, and their names stand beside them.
"""

import io
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from distill.comparison.rows import Row
from distill.visual import pyplot
from teachers.pretrained import write_atomically

# Colours that stay apart in the common kinds of colour blindness (Okabe and Ito), each legible on white and on black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b8609a", "#8a7a00", "#3f8fc4", "#7a6cc0", "#808080")
MARKERS = "os^Dv*XPp<>h"
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1, 1, 1, 1, 1)))
TICKS = ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9))
INK = "#010203"  # stands for the colour of the page's text
LEFT, LABELS_AT, LABEL_SIZE = 0.14, 0.09, 9  # the axes' left edge; the names, beside the axes in widths of them; points
SIZE = (5.0, 3.7)  # inches, so that letters stay legible at the width of a phone
STYLE = {
    "font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "distill", "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.7, "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK,
    "ytick.color": INK, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "lines.linewidth": 1.6, "lines.markersize": 6,
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A named line with one style in all plots. ``x`` is ``None`` for what has no place on the axis: a level."""

    name: str
    model: int  # its colour and marker
    dashes: int
    points: list[tuple[float | None, float, tuple[float, float] | None]]  # x, y, interval

    @property
    def drawn(self) -> dict:
        colour, marker = COLOURS[self.model % len(COLOURS)], MARKERS[self.model % len(MARKERS)]
        return {"color": colour, "marker": marker, "linestyle": DASHES[self.dashes % len(DASHES)]}


def lines_over(rows: list[Row], key: str, x: str, by_steps: bool) -> list[Line]:
    """A score of every model over an attribute ``x`` of its rows: one line a model, or one for each number of steps, which
    then differ in their dashes.
    """
    models = list(dict.fromkeys(row.entry.name for row in rows))
    of_model: Counter[str] = Counter()
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.line if by_steps else row.entry.name, []).append(row)
    lines = []
    for name, own in found.items():
        own = [row for row in own if key in row.scores]
        points = [(getattr(row, x), row.scores[key]["value"], row.scores[key]["interval"]) for row in own]
        if points:
            points.sort(key=lambda point: (point[0] is None, point[0]))
            model = own[0].entry.name
            lines.append(Line(name, models.index(model), of_model[model], points))
            of_model[model] += 1
    return lines


def plot(lines: list[Line], floor: float | None, xlabel: str, ylabel: str, logarithmic: tuple[bool, bool], ticks=None):
    """A figure of lines; ``floor`` is the score of real images."""
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=SIZE)
        for line in lines:
            draw_line(axes, line)
        if floor is not None:
            axes.axhline(floor, color=INK, linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
        axes.margins(0.06, 0.08)
        axes.set_xscale("log" if logarithmic[0] else "linear")
        axes.set_yscale("log" if logarithmic[1] else "linear")
        for axis, is_log in zip((axes.xaxis, axes.yaxis), logarithmic, strict=True):
            set_ticks(axis, is_log)
        if ticks is not None:
            axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid(True, color=INK, alpha=0.12, linewidth=0.6)
        figure.subplots_adjust(left=LEFT, right=right_edge(figure, lines), top=0.97, bottom=0.15)
        label_ends(figure, axes, lines, floor)
    return figure


def draw_line(axes, line: Line) -> None:
    level = [point for point in line.points if point[0] is None]
    placed = [point for point in line.points if point[0] is not None]
    if placed:
        axes.plot([p[0] for p in placed], [p[1] for p in placed], markeredgewidth=0, **line.drawn)
    for x, _, interval in placed:
        if interval is not None:
            axes.plot([x, x], interval, color=line.drawn["color"], linewidth=1, alpha=0.55, solid_capstyle="butt")
    for _, y, _ in level:
        axes.axhline(y, color=line.drawn["color"], linestyle=line.drawn["linestyle"], linewidth=1.2)


def set_ticks(axis, is_log: bool) -> None:
    if not is_log:
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        return
    low, high = axis.get_view_interval()
    for digits in TICKS:  # as many as are needed to read the axis
        ticks = [m * 10**e for e in range(-5, 7) for m in digits if low <= m * 10**e <= high]
        if len(ticks) >= 4:
            break
    else:
        ticks = [tick for tick in MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high) if low <= tick <= high]
    axis.set_ticks(ticks)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_ticks([], minor=True)


def right_edge(figure, lines: list[Line]) -> float:
    """Where the axes have to end, as a share of the figure, for the longest name to fit beside them."""
    texts = [figure.text(0, 0, name, fontsize=LABEL_SIZE) for name in ("real images", *(line.name for line in lines))]
    longest = max(text.get_window_extent().width for text in texts) / figure.bbox.width
    for text in texts:
        text.remove()
    return max(0.4, (0.99 - longest + LABELS_AT * LEFT) / (1 + LABELS_AT))


def label_ends(figure, axes, lines: list[Line], floor: float | None) -> None:
    """Names in the right margin, each at the height where its line ends or, where they are close, near it."""
    figure.canvas.draw()
    ends = [(line.points[-1][1], line.name, line.drawn["color"], line.drawn["marker"], line.points[-1][0]) for line in lines]
    ends += [] if floor is None else [(floor, "real images", INK, None, None)]
    to_pixels, inverse = axes.transData, axes.transAxes.inverted()
    right = axes.get_xlim()[1]
    heights = [inverse.transform(to_pixels.transform((right, y)))[1] for y, *_ in ends]
    for (y, name, colour, marker, x), own, height in zip(ends, heights, spread(heights, 0.058), strict=True):
        start = 1.0 if x is None else inverse.transform(to_pixels.transform((x, y)))[0]
        axes.plot(
            [start, 1.0, 1.035], [own, own, height], transform=axes.transAxes, clip_on=False, color=colour, linewidth=0.6,
            alpha=0.5, zorder=0,
        )  # fmt: skip
        if marker is not None:
            beside = {"transform": axes.transAxes, "clip_on": False, "markeredgewidth": 0}
            axes.plot([1.06], [height], color=colour, marker=marker, **beside)
        axes.text(1 + LABELS_AT, height, name, transform=axes.transAxes, va="center", fontsize=LABEL_SIZE)


def spread(values: list[float], gap: float) -> list[float]:
    """Values moved apart to at least ``gap``, in their order, as little as possible and, while there is room, in [0, 1]."""
    order = sorted(range(len(values)), key=values.__getitem__)
    placed = [values[i] for i in order]
    for _ in range(200):
        for i in range(1, len(placed)):
            if (short := gap - (placed[i] - placed[i - 1])) > 1e-6:
                placed[i - 1] -= short / 2
                placed[i] += short / 2
        placed = [max(v, gap * i) for i, v in enumerate(placed)]
        placed = [min(v, 1.0 - gap * (len(placed) - 1 - i)) for i, v in enumerate(placed)]
    moved = [0.0] * len(values)
    for i, value in zip(order, placed, strict=True):
        moved[i] = value
    return moved


def save(figure, path: Path, description: str) -> str:
    """The figure as a PNG in a file, and as SVG to be put into a page."""
    plt = pyplot()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=160))
    text = io.StringIO()
    with plt.rc_context(STYLE):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return inline_svg(text.getvalue(), description)


def inline_svg(text: str, description: str) -> str:
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S).replace(INK, "currentColor")
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    escaped = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escaped}"', 1)
