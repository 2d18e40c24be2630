"""The report of a comparison: one page that needs nothing else, the same as JSON, and its pictures as PNGs."""

import json
from pathlib import Path

import numpy as np
import yaml

from distill.comparison import words
from distill.comparison.config import ComparisonConfig
from distill.comparison.entries import ImagesEntry, ModelEntry
from distill.comparison.page import Pieces, attribute, picture, script_json
from distill.comparison.plots import lines_over, plot, save
from distill.comparison.rows import Row, baseline, differences
from distill.comparison.scores import METRICS, Metric
from distill.comparison.store import PER_CLASS, SHOWN_CLASSES
from distill.visual import save_strips
from teachers.pretrained import write_atomically

# Scores over guidance, as in the paper's figure 7, and how a sentence calls them.
OVER_GUIDANCE = {"precision (k=3)": "precision", "recall (k=3)": "recall", "FD": "the Fréchet distance"}


def write_report(
    config: ComparisonConfig, entries: list[ModelEntry | ImagesEntry], rows: list[Row], real: Row | None, facts: dict
) -> dict:
    """Write ``report.html``, ``report.json`` and ``images/`` into ``output_dir``; returns what is in the JSON."""
    return Report(config, entries, rows, real, facts).write()


class Report:
    def __init__(self, config, entries, rows, real, facts):
        self.config, self.entries, self.rows, self.real, self.facts = config, entries, rows, real, facts
        self.folder, self.pieces = Path(config.output_dir), Pieces()
        self.shown = rows + ([] if real is None else [real])
        self.lines = {line: [r for r in self.shown if r.line == line] for line in dict.fromkeys(r.line for r in self.shown)}
        self.scales = sorted({row.guidance for row in rows if row.guidance is not None})
        self.features = next(iter(rows[0].scores)).removesuffix("-FD")
        present = {key for row in self.shown for key in row.scores}
        self.metrics = [m for m in METRICS if self.key(m.key) in present]
        self.sheets = {id(row): sheets(row) for row in self.shown}
        self.classes = sorted({c for strips in self.sheets.values() for c in strips if c != "all"}, key=int)

    @property
    def precision(self) -> str:
        return "fp32" if self.config.mixed_precision == "no" else self.config.mixed_precision

    def key(self, metric: str) -> str:
        return f"{self.features}-{metric}"

    def write(self) -> dict:
        content = self.content()
        data = script_json({"scales": self.scales, "lines": self.line_data()})
        page = self.pieces.page(**self.head(), **self.samples(), **self.plots(), **self.tables(), **self.end(), data=data)
        self.write_grids()
        text = json.dumps(content, indent=1)
        write_atomically(self.folder / "report.json", lambda path: path.write_text(text, encoding="utf-8"))
        write_atomically(self.folder / "report.html", lambda path: path.write_text(page, encoding="utf-8"))
        return content

    def content(self) -> dict:
        """What is in ``report.json``."""
        compared = []
        for row in self.rows:
            teacher = baseline(row, self.rows)
            outside = {key: sign for key, sign in differences(row, teacher).items() if sign}
            compared.append({**row.plain(), "teacher": teacher and teacher.line, "outside_both_intervals": outside})
        weights: dict[str, dict] = {}
        for entry in self.entries:
            if isinstance(entry, ModelEntry):
                weights.setdefault(entry.name, {})[entry.source] = entry.sha256
        return {
            "title": self.config.title, "features": self.features, "rows": compared,
            "real": self.real and self.real.plain(), "sha256": weights, **self.facts,
            "drawn_on": self.settings(), "sampling_seconds": self.sampling_seconds(),
        }  # fmt: skip

    # ---- the page, from its top ------------------------------------------------------------------------------------

    def head(self) -> dict:
        config = self.config
        several = f"each of the seeds {words.joined([str(s) for s in config.seeds])}"
        seeds = f"seed {config.seeds[0]}" if len(config.seeds) == 1 else several
        lead = (
            f"{words.joined([m.name for m in config.models])}: {config.num_samples:,} samples of each for {seeds}, from the "
            f"same noise and for the same labels, scored against {config.data.source} on {self.features} features."
        )
        notes = self.pieces.fill("note", text=config.notes) if config.notes else ""
        first = f"{self.scales[0]:g}" if self.scales else ""
        showing = [f"guidance scale {first}"] * (len(self.scales) > 1) + ["all classes"] * bool(self.classes)
        options = [("all", "all", " selected")] + [(c, c, "") for c in self.classes]
        return {
            "title": config.title, "lead": lead, "notes": notes, "first_scale": first,
            "last_scale": max(len(self.scales) - 1, 0),
            "scale_options": "".join(f'<option value="{i}"></option>' for i in range(len(self.scales))),
            "class_options": "".join(self.pieces.fill("option", value=v, text=t, attributes=a) for v, t, a in options),
            "scale_hidden": "" if len(self.scales) > 1 else " hidden", "class_hidden": "" if self.classes else " hidden",
            "status": f"Showing {', '.join(showing)}." if showing else "",
        }  # fmt: skip

    def line_data(self) -> dict:
        """What the script chooses from: of every line by guidance scale (``none`` without one)."""
        data = {}
        for i, (line, own) in enumerate(self.lines.items()):
            data[str(i)] = {"name": line, "shown": {scale_key(r): self.shown_of(r) for r in own}}
        return data

    def shown_of(self, row: Row) -> dict:
        return {"cost": price(row), "strips": self.sheets[id(row)], "pairs": pairs(row)}

    def samples(self) -> dict:
        grid, duplicates = [], []
        for i, own in enumerate(self.lines.values()):
            row = min(own, key=lambda r: abs((r.guidance or 0) - (self.scales or [0])[0]))
            at = "" if row.guidance in (None, *self.scales[:1]) else f"at guidance scale {row.guidance:g}"
            common = {"line": i, "name": row.line, "cost": price(row), "at": at}
            sheet = self.sheets[id(row)]["all"]
            alt = f"{row.line}: samples{' of all classes' if self.classes else ''}"
            grid.append(self.pieces.fill("strip", src=sheet["src"], columns=sheet["columns"], alt=alt, **common))
            figures = [self.pieces.fill("pair", **p, alt=f"two of {row.line}, {p['distance']} apart") for p in pairs(row)]
            duplicates.append(self.pieces.fill("pairs", pairs="".join(figures), **common))
        caption = (
            "Every column starts from one noise and has one label, whatever the model; only real images and folders do not. "
            "These are the first samples, not chosen ones."
        )
        return {
            "samples_caption": caption, "grid": "\n".join(grid), "duplicates": "\n".join(duplicates),
            "duplicates_caption": words.about_duplicates(self.rows, self.real)
            + f" Below are the nearest pairs of each, with their distance in {self.features} features.",
        }  # fmt: skip

    def plots(self) -> dict:
        lowest = self.scales[0] if self.scales else None
        at_lowest = [r for own in self.lines.values() for r in own if r.entry.role != "real"
                     and (r.guidance in (None, lowest) or len({q.guidance for q in own}) == 1)]  # fmt: skip
        cost = [
            self.plot_cost(at_lowest, "nfe", "network evaluations an image"),
            self.plot_cost(at_lowest, "ms_per_image", "milliseconds an image"),
        ]
        hardware = self.settings()[0]["hardware"]
        sizes = list(dict.fromkeys(s["batch_size"] for s in self.settings()))
        note = words.how_cost_is_counted(lowest, sizes, self.precision, hardware)
        over = [self.plot_guidance(key, name) for key, name in OVER_GUIDANCE.items()]
        return {"cost_plots": "\n".join(cost), "guidance_plots": "\n".join(over), "cost_note": note}

    def floor(self, metric: str) -> float | None:
        return None if self.real is None else self.real.scores[self.key(metric)]["value"]

    def plot_cost(self, rows: list[Row], cost: str, label: str) -> str:
        caption = words.about_cost(rows, self.key("FD"), cost)
        lines = lines_over(rows, self.key("FD"), cost, by_steps=False)
        figure = plot(lines, self.floor("FD"), label, f"{self.features} Fréchet distance", (True, True))
        return self.figure(figure, f"cost-{cost.replace('_', '-')}", caption)

    def plot_guidance(self, metric: str, name: str) -> str:
        caption = words.about_guidance(self.rows, self.key(metric), name)
        lines = lines_over(self.rows, self.key(metric), "guidance", by_steps=True)
        title = "Fréchet distance" if metric == "FD" else metric
        ticks = self.scales if len(self.scales) < 9 else None
        figure = plot(lines, self.floor(metric), "guidance scale", f"{self.features} {title}", (False, False), ticks)
        return self.figure(figure, f"guidance-{name.split()[-1]}", caption)

    def figure(self, figure, name: str, caption: str) -> str:
        svg = save(figure, self.folder / "images" / f"{name}.png", caption)
        return self.pieces.fill("plot", svg=svg, caption=caption)

    # ---- tables ----------------------------------------------------------------------------------------------------

    def tables(self) -> dict:
        texts = {}
        for table in ("quality", "diversity"):
            metrics = [m for m in self.metrics if m.table == table]
            texts[f"{table}_table"] = self.table(table, metrics)
            texts[f"{table}_caption"] = words.about_table(self.rows, [self.key(m.key) for m in metrics])
        fill = self.pieces.fill
        explained = [fill("fact", key=m.key, value=m.explanation + ".") for m in self.metrics]
        return {
            **texts, "explanations": "\n".join(explained), "legend": words.legend({row.entry.role for row in self.rows}),
            "intervals": words.what_intervals_are(len(self.config.seeds)),
        }  # fmt: skip

    def table(self, name: str, metrics: list[Metric]) -> str:
        fill = self.pieces.fill
        heads = [fill("head", small=self.features, name=m.key) for m in metrics]
        if name == "quality":
            heads += [fill("head", small="network", name="evaluations"), fill("head", small="measured", name="ms an image")]
        bodies = []
        for scale in self.scales:
            rows = [row for row in self.rows if row.guidance == scale]
            title = f"guidance scale {scale:g}"
            bodies.append(self.body(title, rows, metrics, len(heads) + 1, attribute("data-scale", scale), name))
        rest = [row for row in self.shown if row.guidance is None]
        if rest:
            bodies.append(self.body("images", rest, metrics, len(heads) + 1, "", name))
        return fill("table", label=f"Table of {name}", heads="".join(heads), bodies="\n".join(bodies))

    def body(self, title: str, rows: list[Row], metrics: list[Metric], columns: int, attributes: str, name: str) -> str:
        lines = [self.line(row, metrics, name) for row in rows]
        return self.pieces.fill("body", title=title, columns=columns, attributes=attributes, rows="\n".join(lines))

    def line(self, row: Row, metrics: list[Metric], name: str) -> str:
        marks = differences(row, baseline(row, self.rows))
        cells = [self.cell(row.scores.get(self.key(m.key)), m, marks.get(self.key(m.key), 0)) for m in metrics]
        if name == "quality":
            times = "" if row.ms_per_image is None else f"{row.ms_per_image:.3g}"
            cells += [self.plain_cell(row.nfe or ""), self.plain_cell(times)]
        title = row.line if row.num_samples == self.config.num_samples else f"{row.line} ({row.num_samples:,} only)"
        return self.pieces.fill("line", name=title, cells="".join(cells))

    def cell(self, score: dict | None, metric: Metric, sign: int) -> str:
        if score is None:
            return self.plain_cell("")
        kind = ("", "better", "worse")[sign * metric.better] if metric.better else "apart" * bool(sign)
        arrow, said = {0: ("", ""), 1: ("▲", "above its teacher"), -1: ("▼", "below its teacher")}[sign]
        mark = self.pieces.fill("mark", sign=arrow, words=said) if sign else ""
        interval = " to ".join(words.number(end, metric.share) for end in score["interval"] or [])
        value = words.number(score["value"], metric.share)
        return self.pieces.fill("cell", kind=kind, value=value, mark=mark, interval=interval)

    def plain_cell(self, value) -> str:
        return self.pieces.fill("cell", kind="", value=value, mark="", interval="")

    # ---- how it was made -------------------------------------------------------------------------------------------

    def end(self) -> dict:
        fill, settings = self.pieces.fill, self.settings()
        models = [
            fill("model", name=e.name, source=e.source, role=e.role, sampler=sampler(e), sha256=e.sha256 or "")
            for e in self.entries
        ]
        facts = {"seeds": ", ".join(map(str, self.config.seeds)), "samples a point": f"{self.config.num_samples:,}"}
        facts["evaluated in"] = self.precision
        for key in ("hardware", "system", "python", "torch", "scm-distill"):
            facts[key] = "; ".join(dict.fromkeys(s[key] for s in settings))
        facts["drawn on"] = "; ".join(dict.fromkeys(s["date"] for s in settings))
        last = duration(self.facts["seconds"])
        facts["time"] = f"{duration(self.sampling_seconds())} of sampling; the last call took {last}"
        return {
            "date": self.facts["setting"]["date"], "command": self.facts["command"], "models": "\n".join(models),
            "facts": "\n".join(fill("fact", key=k, value=v) for k, v in facts.items()),
            "config": yaml.safe_dump(self.facts["config"], sort_keys=False),
        }  # fmt: skip

    def settings(self) -> list[dict]:
        """What the samples were drawn on: more than one, if a comparison was continued elsewhere."""
        drawn = [r["drawn"] for row in self.rows for r in row.results]
        return [s for i, s in enumerate(drawn) if s not in drawn[:i]]

    def sampling_seconds(self) -> float:
        drawn = [r for row in self.rows for r in row.results if r["ms_per_image"] is not None]
        return sum(r["ms_per_image"] * r["num_samples"] / 1000 for r in drawn)

    def write_grids(self) -> None:
        """A PNG for every guidance scale: a row a model, one column a noise and label."""
        for scale in self.scales or [None]:
            rows = {r.line: first_images(r) for r in self.shown if r.guidance in (None, scale)}
            at, title = ("", "") if scale is None else (f"-guidance-{scale:g}", f", guidance scale {scale:g}")
            save_strips(rows, self.folder / "images" / f"samples{at}.png", f"the same noise and labels{title}")


def scale_key(row: Row) -> str:
    return "none" if row.guidance is None else str(row.guidance)


def price(row: Row) -> str:
    if row.nfe is None:
        return row.entry.source
    return f"{row.nfe} evaluation{'s' * (row.nfe > 1)}, {row.ms_per_image:.3g} ms"


def sampler(entry: ModelEntry | ImagesEntry) -> str:
    if not isinstance(entry, ModelEntry):
        return ""
    steps = f"{words.joined([str(n) for n in entry.steps])} step{'s' * (entry.steps != [1])}"
    scales = f"guidance {words.joined([f'{w:g}' for w in entry.scales])}"
    return f"{entry.solver + ', ' if entry.role == 'teacher' else ''}{steps}, {scales}"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def shown_classes(row: Row) -> np.ndarray | None:
    """Of the samples that are shown: as asked for, else as seen."""
    images = row.images
    classes = images.get("asked", images.get("seen"))
    return None if classes is None else classes[images["grid_indices"]].numpy()


def first_images(row: Row) -> np.ndarray:
    """One of each class, twice; without classes the first ones."""
    images, classes = row.images["grid"].numpy(), shown_classes(row)
    if classes is None:
        return images[: 2 * PER_CLASS]
    found = [np.flatnonzero(classes == c) for c in range(SHOWN_CLASSES)]
    turns = [[own[turn] for own in found if len(own) > turn] for turn in range(2)]
    return images[[i for turn in turns for i in turn]]


def sheets(row: Row) -> dict[str, dict]:
    """Strips of samples by class, and one of all of them: ``src`` and how many columns it has."""
    images, classes = row.images["grid"].numpy(), shown_classes(row)
    mixed = first_images(row)
    columns = max(-(-len(mixed) // 2), 1)
    strips = {"all": {"src": picture(mixed, columns), "columns": columns}}
    for c in range(SHOWN_CLASSES if classes is not None else 0):
        own = images[np.flatnonzero(classes == c)[:PER_CLASS]]
        if len(own):
            strips[str(c)] = {"src": picture(own, len(own)), "columns": len(own)}
    return strips


def pairs(row: Row) -> list[dict]:
    images = row.images["pairs"].numpy().reshape(-1, 2, *row.images["pairs"].shape[1:])
    return [
        {"src": picture(pair, 2), "distance": words.number(found["distance"])}
        for pair, found in zip(images, row.nearest_pairs, strict=True)
    ]
