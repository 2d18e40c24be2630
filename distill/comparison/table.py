"""What ``distill compare`` prints."""

from distill.evaluation import format_table

COLUMNS = ("FD", "precision (k=3)", "recall (k=3)", "coverage (k=5)", "Vendi in a class", "asked class")


def format_rows(report: dict) -> str:
    """The scores of a report that matter most, as a Markdown table."""
    rows = {}
    for row in report["rows"] + ([report["real"]] if report["real"] else []):
        steps = "" if row["steps"] is None else f", {row['steps']} step{'s' * (row['steps'] > 1)}"
        scale = "" if row["guidance_scale"] is None else f", guidance {row['guidance_scale']:g}"
        names = {key: f"{report['features']}-{key}" for key in COLUMNS}
        scores = {name: row["scores"][name]["value"] for name in names.values() if name in row["scores"]}
        rows[row["model"] + steps + scale] = {"num_samples": row["num_samples"], "NFE": row["network_evaluations"], **scores}
    return format_table(rows)
