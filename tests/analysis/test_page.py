"""Pages and charts: what is text stays text, colours can be read, pictures say what they show."""

from __future__ import annotations

import re
import xml.etree.ElementTree

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from keras_dsr.analysis import charts, figures, page

NASTY = '<b>&"'
SAFE = "&lt;b&gt;&amp;"
PIXELS = np.zeros((2, 2, 3), "uint8")
FORMS = {
    "page": lambda: page.page(NASTY, NASTY, [page.Section("key", NASTY, "")]),
    "figure": lambda: page.figure(NASTY, "", NASTY),
    "paragraph": lambda: page.paragraph(NASTY),
    "missing": lambda: page.missing(NASTY),
    "numbers": lambda: page.numbers([(NASTY, NASTY)]),
    "bullets": lambda: page.bullets([NASTY]),
    "table": lambda: page.table([NASTY], [[NASTY, NASTY]], NASTY),
    "matrix": lambda: page.matrix([NASTY, "b"], np.eye(2, dtype=int), NASTY),
    "image": lambda: page.image(PIXELS, NASTY),
    "film": lambda: page.film([PIXELS], NASTY),
    "lines": lambda: charts.lines({NASTY: ([0, 1], [0, 1]), "b": ([0, 1], [1, 0])}, NASTY, NASTY, NASTY),
    "bars": lambda: charts.bars({NASTY: {NASTY: 1.0, "b": 2.0}}, NASTY, NASTY, stacked=False),
    "points": lambda: charts.points({NASTY: ([0], [1]), "b": ([1], [1])}, NASTY, NASTY, NASTY),
    "raster": lambda: charts.raster({NASTY: np.eye(4, dtype=bool)}, NASTY),
}


@pytest.mark.parametrize("name", FORMS)
def test_names_and_captions_are_text(name):
    written = FORMS[name]()
    assert "<b>" not in written
    assert SAFE in written
    for value in re.findall(r'(?:alt|aria-label)="([^"]*)"', written):
        assert "<" not in value
        assert value.count("&") == len(re.findall(r"&(?:lt|gt|amp|quot|#x27);", value))
    if name in ("image", "film", "lines", "bars", "points", "raster", "table", "matrix"):
        assert re.search(r'(?:alt|aria-label)="&lt;b&gt;&amp;&quot;', written)


@pytest.mark.parametrize("name", ["lines", "bars", "points", "raster"])
def test_charts_are_xml_in_the_colours_of_the_page(name):
    written = FORMS[name]()
    root = xml.etree.ElementTree.fromstring(written)
    assert root.tag.endswith("svg")
    assert root.attrib["role"] == "img"
    assert "var(--c1)" in written
    assert not re.search(r"#0102[0-9a-f]{2}", written), "no stand-in is left"
    ids = re.findall(r' id="([^"]+)"', written)
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', written)) == set(ids)


def luminance(color):
    parts = np.array([int(color[n : n + 2], 16) for n in (1, 3, 5)]) / 255
    return float(np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1, 2], ids=["light", "dark", "print"])
def test_numbers_in_full_cells_can_be_read(scheme):
    """By the contrast that WCAG 2 asks of text, level AA."""
    colors = dict(re.findall(r"--(\w+): (#\w{6})", page._STYLE.split(":root")[1 + scheme]))
    part = int(re.search(r"var\(--v\) \* (\d+)%", page._STYLE)[1]) / 100
    full = [
        round(part * int(colors["c1"][n : n + 2], 16) + (1 - part) * int(colors["card"][n : n + 2], 16))
        for n in (1, 3, 5)
    ]
    assert contrast("#" + "".join(f"{each:02x}" for each in full), colors["ink"]) >= 4.5
    assert contrast(colors["card"], colors["ink"]) >= 4.5


@pytest.mark.parametrize("name", ["table", "matrix"])
def test_what_scrolls_can_be_reached_by_keys(name):
    (attributes,) = re.findall(r'<div class="scroll"([^>]*)>', FORMS[name]())
    assert 'tabindex="0"' in attributes
    assert 'role="region"' in attributes


def test_what_is_shown_of_many():
    assert charts.thinned(5, 9).tolist() == [0, 1, 2, 3, 4]
    assert charts.thinned(101, 3).tolist() == [0, 50, 100]
    assert charts.spread(list("abcde"), 3) == ["a", "c", "e"]
    assert charts.spread(list("ab"), 3) == ["a", "b"]


def test_pictures_of_inputs():
    gray = figures.picture(np.array([[[-1.0], [3.0]]]))
    assert gray.shape == (1, 2, 3)
    assert gray[0].tolist() == [[0, 0, 0], [1, 1, 1]]
    events = np.zeros((2, 1, 3, 2))
    events[0, 0, 0, 1] = events[1, 0, 1, 0] = 2
    on, off, none = figures.picture(events)[0]
    assert on.argmax() == 0
    assert off.argmax() == 2
    assert none.tolist() == [1, 1, 1]
