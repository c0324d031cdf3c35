"""A chart as plain data: a Plotly figure whose colours are names of the page's theme, so that one chart serves light and dark.

Strings that begin with @ are such names (`static/look.js`).
"""

import html
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

SERIES = 8  # colours that everyone can tell apart; further lines are dashed
DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True)
class Chart:
    """A Plotly figure. `section`: the heading it is under; "" where a page has no headings."""

    key: str  # id of its element
    title: str
    subtitle: str
    data: list[dict]
    layout: dict
    wide: bool = False  # both columns
    height: int = 280
    section: str = ""


def plain(values: Iterable[float]) -> list[float | None]:
    """As JSON has them: a gap in the curve where there is no number."""
    return [value if math.isfinite(value) else None for value in np.asarray(values, dtype=float).tolist()]


def text(words: Any) -> str:
    """For legends and hovers, where Plotly takes tags for its own."""
    return html.escape(str(words), quote=False)


def style(i: int) -> dict[str, str]:
    """Of the i-th of several curves alike."""
    return {"color": f"@series{i % SERIES}", "dash": DASHES[i // SERIES % len(DASHES)]}


def level(value: float, color: str = "@muted", dash: str = "dash") -> dict:
    """A straight line across."""
    pen = {"color": color, "width": 1.2, "dash": dash}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value, "line": pen}


def word(value: float, words: str, color: str = "@muted", *, right: bool = True) -> dict:
    """Above a straight line."""
    return {"xref": "paper", "x": 1 if right else 0, "xanchor": "right" if right else "left", "y": value, "yanchor": "bottom",
            "text": text(words), "showarrow": False, "font": {"size": 11, "color": color}, "bgcolor": "@card", "opacity": 0.9}  # fmt: skip
