"""One sentence for each plot and table of the report, computed from what it shows."""

from collections import Counter

from distill.comparison.rows import Row, baseline, differences
from distill.comparison.scores import outside


def legend(roles: set[str]) -> str:
    images = " (of a folder of images: at the lowest one)" if "images" in roles else ""
    return (
        f"▲ and ▼: above and below its teacher at the same guidance scale{images}, outside the intervals of both; green "
        "where that is better or more diverse, orange where it is worse or less diverse. Everything else is not marked."
    )


def how_cost_is_counted(scale: float | None, batch_sizes: list[str], precision: str, hardware: str) -> str:
    where = "" if scale is None else f"At guidance scale {scale:g}, or the only one that a model has. "
    return (
        f"{where}An evaluation is one call of the network for one image: Heun's method in n steps makes 2n - 1 of them, "
        "DPM-Solver++ n, a student one a step; a guided teacher makes each of them twice, with the class and without. Times "
        f"are measured, the median over batches of {joined(batch_sizes)}, in {precision}, on {hardware}."
    )


def what_intervals_are(seeds: int) -> str:
    alone = (
        "for scores that are a statistic of single samples, given the real ones; those that compare samples with each other "
        "(Fréchet and kernel distance, recall, coverage, Vendi, distances in a class, near duplicates), and the entropy of "
        "classes, have none there."
    )
    if seeds == 1:
        return f"There is one seed. Below a score is its 95 % interval (Wilson's for shares, else by bootstrap) {alone}"
    return (
        f"Below a score is its 95 % interval over {seeds} seeds (Student's t; with few seeds it is wide). Real images and "
        f"folders are one set of samples; their intervals are Wilson's for shares and else by bootstrap, {alone}"
    )


def number(number: float, is_share: bool = False) -> str:
    """Three significant digits; of shares three after the point."""
    return f"{number:.3f}" if is_share else f"{number:#.3g}".rstrip(".")


def times(factor: float) -> str:
    return f"{factor:.1f}" if factor < 9.95 else f"{factor:.0f}"


def joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def about_cost(rows: list[Row], key: str, cost: str) -> str:
    """The best student beside the best teacher. ``cost``: ``nfe`` or ``ms_per_image``."""
    drawn = [row for row in rows if getattr(row, cost) is not None and key in row.scores]
    if not drawn:
        return "There is no model here that draws samples."
    student = best_of([r for r in drawn if r.entry.role == "student"], key)
    all_teachers = [r for r in drawn if r.entry.role == "teacher"]
    alike = [r for r in all_teachers if student is not None and r.guidance == student.guidance]
    teacher = best_of(alike or all_teachers, key)
    if teacher is None or student is None:
        only = teacher or student
        return f"The lowest distance is {number(only.scores[key]['value'])}, of {only.said} at {price(only, cost)}."
    ratio = student.scores[key]["value"] / max(teacher.scores[key]["value"], 1e-12)
    cheaper = getattr(teacher, cost) / getattr(student, cost)
    effort = f"{times(cheaper)} times less" if cheaper > 1 else f"{times(1 / cheaper)} times more"
    fewer = {"nfe": "evaluations", "ms_per_image": "time"}[cost]
    scale = [at_scale(row) if student.guidance != teacher.guidance else "" for row in (student, teacher)]
    return (
        f"The best student here, {student.said}{scale[0]}, has a distance of {number(student.scores[key]['value'])} at "
        f"{price(student, cost)}; that is {ratio:.2f} times the {number(teacher.scores[key]['value'])} of "
        f"{teacher.said}{scale[1]} at {price(teacher, cost)}"
        f"{', a difference within the intervals' if is_uncertain(student.scores[key], teacher.scores[key]) else ''}, with "
        f"{effort.replace('less', 'fewer') if fewer == 'evaluations' else effort} {fewer}."
    )


def is_uncertain(score: dict, other: dict) -> bool:
    """Whether two scores have intervals that touch."""
    return None not in (score["interval"], other["interval"]) and not outside(score, other)


def best_of(rows: list[Row], key: str) -> Row | None:
    return min(rows, key=lambda row: row.scores[key]["value"], default=None)


def price(row: Row, cost: str) -> str:
    if cost == "nfe":
        return f"{row.nfe} evaluation{'s' * (row.nfe > 1)}"
    return f"{row.ms_per_image:.3g} ms"


def about_guidance(rows: list[Row], key: str, title: str) -> str:
    """Between which values a score moves from the lowest guidance scale to the highest."""
    lines: dict[str, list[Row]] = {}
    for row in sorted((r for r in rows if r.guidance is not None and key in r.scores), key=lambda r: r.guidance):
        lines.setdefault(row.said, []).append(row)
    moving = {name: own for name, own in lines.items() if len(own) > 1}
    fixed = {name: own[0] for name, own in lines.items() if len(own) == 1}
    if not moving:
        return f"No model here was drawn at more than one guidance scale, so that {title} cannot be followed."
    ends = {name: (own[0].guidance, own[-1].guidance) for name, own in moving.items()}
    (low, high), _ = Counter(ends.values()).most_common(1)[0]  # only changes between the same scales are compared
    order = sorted((n for n in moving if ends[n] == (low, high)), key=lambda name: -abs(change(moving[name], key)))
    extremes = dict.fromkeys((order[0], order[-1]))
    told = [f"from {value(moving[n][0], key)} to {value(moving[n][-1], key)} for {n}" for n in extremes]
    if len(order) > 2:
        told = [f"{told[0]}, the largest change of {len(order)},", f"{told[1]}, the smallest"]
    alone = joined([f"{name} has {value(row, key)}" for name, row in fixed.items()]) if fixed else ""
    rest = f" {alone}, at the only scale that {'it has' if len(fixed) == 1 else 'they have'}."
    sentence = f"From guidance scale {low:g} to {high:g}, {title} goes {' and '.join(told)}."
    return f"{sentence}{rest if 0 < len(fixed) <= 2 else ''}"


def change(rows: list[Row], key: str) -> float:
    return rows[-1].scores[key]["value"] - rows[0].scores[key]["value"]


def value(row: Row, key: str) -> str:
    return number(row.scores[key]["value"])


def about_table(rows: list[Row], keys: list[str]) -> str:
    """How many differences from the teacher lie outside both intervals."""
    pairs = [(row, other) for row in rows if (other := baseline(row, rows)) is not None]
    if not pairs:
        return "There is no teacher among these models that the others could be compared with."
    judged = [sign for row, other in pairs for key, sign in differences(row, other).items() if key in keys]
    if not judged:
        return "No difference from the teacher can be judged: these scores have no intervals with one seed."
    return f"{sum(map(abs, judged))} of the {len(judged)} differences from the teacher that have intervals lie outside both."


def about_duplicates(rows: list[Row], real: Row | None) -> str:
    closest = min(rows, key=lambda row: row.nearest_pairs[0]["distance"])
    told = (
        f"The nearest two of {closest.num_samples:,} samples are {number(closest.nearest_pairs[0]['distance'])} apart, "
        f"drawn by {closest.said}{at_scale(closest)}"
    )
    if real is None:
        return f"{told}."
    return f"{told}; the nearest two of {real.num_samples:,} real images {number(real.nearest_pairs[0]['distance'])}."


def at_scale(row: Row) -> str:
    return "" if row.guidance is None else f" at guidance scale {row.guidance:g}"
