"""Pieces of the report's page, which lie as HTML, CSS and JavaScript in ``distill/assets/report``, and pictures for it."""

import base64
import html
import io
import json
import re

import numpy as np
from PIL import Image

from distill.data import ASSETS
from distill.visual import to_pil

FOLDER = ASSETS / "report"
PIECE = re.compile(r"<!-- piece (\w+) -->\n(.*?)<!-- /piece -->", re.S)
HOLE = re.compile(r"\{\{\{(\w+)\}\}\}|\{\{(\w+)\}\}")
LARGEST = 96  # pixels of an image in the page; larger ones are made smaller


class Pieces:
    """The pieces of ``page.html`` by name."""

    def __init__(self):
        self.found = dict(PIECE.findall((FOLDER / "page.html").read_text(encoding="utf-8")))

    def fill(self, piece: str, **values) -> str:
        """A piece with its holes filled; ``{{name}}`` is escaped, ``{{{name}}}`` is HTML already."""

        def value(match: re.Match) -> str:
            raw, escaped = match.groups()
            return str(values[raw]) if raw else html.escape(str(values[escaped]))

        return HOLE.sub(value, self.found[piece]).strip()

    def page(self, **values) -> str:
        style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
        return self.fill("page", style=style, script=script, **values) + "\n"


def attribute(name: str, value) -> str:
    return f' {name}="{html.escape(str(value))}"'


def script_json(values) -> str:
    """JSON that can stand inside a ``<script>``."""
    return json.dumps(values, separators=(",", ":")).replace("<", "\\u003c")


def picture(images: np.ndarray, columns: int) -> str:
    """Images ``(N, H, W, C)`` in 8 bits, ``columns`` a row, as a ``data:`` URI of a PNG."""
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), 128, np.uint8)
    for i, image in enumerate(images):
        y, x = (i // columns) * (height + 1), (i % columns) * (width + 1)
        sheet[y : y + height, x : x + width] = image
    drawn = to_pil(sheet)
    if max(height, width) > LARGEST:
        factor = LARGEST / max(height, width)
        drawn = drawn.resize((round(drawn.width * factor), round(drawn.height * factor)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    drawn.save(buffer, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
