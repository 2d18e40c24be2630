"""Metrics as a Markdown table."""


def format_table(rows: dict[str, dict]) -> str:
    """A Markdown table, one row a model; the last row is the real-against-real floor."""
    keys = list(dict.fromkeys(k for row in rows.values() for k in row if k not in ("floor", "num_samples")))
    lines = ["| model | samples | " + " | ".join(keys) + " |", "|---" * (len(keys) + 2) + "|"]
    floors = {row["floor"]["num_samples"]: row["floor"] for row in rows.values() if "floor" in row}
    named = {**rows, **{f"real test images ({n})": floor for n, floor in floors.items()}}
    for name, row in named.items():
        cells = [show(row[k]) if row.get(k) is not None else "" for k in keys]
        lines.append(f"| {name} | {row.get('num_samples', '')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def show(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
