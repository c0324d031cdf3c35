"""Colours that everyone can tell apart: simulated colour blindness (Machado et al. 2009, full severity), light and dark."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from shoestring.launch import figures

SCRIPT = (Path(figures.__file__).parent / "static" / "look.js").read_text()
STYLES = (Path(figures.__file__).parent / "static" / "look.css").read_text()
SEEN = {  # linear RGB as it is, to linear RGB as it is seen
    "all colours": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
}
APART = 12.0  # CIE 1976 colour difference; 2.3 is just noticeable side by side


def themes() -> dict[str, dict]:
    found = re.search(r"const THEMES = (\{.*?\n\});", SCRIPT, re.DOTALL).group(1)
    return json.loads(re.sub(r",(\s*[}\]])", r"\1", re.sub(r"(\w+):(?=\s*[\"\[{])", r'"\1":', found)))


def linear(code: str) -> np.ndarray:
    rgb = np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    xyz = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]) @ rgb
    t = np.clip(xyz / np.array([0.95047, 1.0, 1.08883]), 0, None)
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one: str, other: str) -> float:
    """WCAG 2."""
    light = sorted(float(np.dot([0.2126, 0.7152, 0.0722], linear(code))) + 0.05 for code in (one, other))
    return light[1] / light[0]


def test_the_measures():
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and lab(linear("#ffffff")) == pytest.approx([100, 0, 0], abs=0.01)
    assert lab(linear("#ff0000")) == pytest.approx([53.24, 80.09, 67.20], abs=0.02)  # as published for sRGB's red


@pytest.mark.parametrize("sight", SEEN)
@pytest.mark.parametrize("theme", themes())
def test_series_are_apart(theme, sight):
    near = {}
    for one, other in itertools.combinations(themes()[theme]["series"], 2):
        apart = np.linalg.norm(lab(np.clip(SEEN[sight] @ linear(one), 0, 1)) - lab(np.clip(SEEN[sight] @ linear(other), 0, 1)))
        if apart < APART:
            near[one, other] = round(float(apart), 1)
    assert near == {}


@pytest.mark.parametrize("theme", themes())
def test_what_is_drawn_stands_out_from_its_ground(theme):
    colors = themes()[theme]
    lines = {name: colors[name] for name in ("blue", "orange", "green", "purple", "red", "yellow")}
    lines |= {f"series {i}": code for i, code in enumerate(colors["series"])}
    assert {name: contrast(code, colors["card"]) for name, code in lines.items() if contrast(code, colors["card"]) < 2} == {}
    assert all(contrast(colors[name], colors["card"]) >= 4.5 for name in ("text", "soft"))


@pytest.mark.parametrize("dark", [0, 1])
def test_words_can_be_read(dark):
    """WCAG's 4.5 for text, on the page and on cards."""
    found = {name: (light, night)[dark] for name, light, night in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", STYLES)}
    for words in ("text", "soft", "muted", "accent", "good", "bad"):
        for ground in ("page", "card"):
            assert contrast(found[words], found[ground]) >= 4.5, (words, ground, contrast(found[words], found[ground]))
    assert contrast(found["warn"], found["warn-card"]) >= 4.5
