"""One HTML page with everything in it: style, script and pictures; light and dark, for a phone, a desk and paper.

It asks nothing of a network, and its own policy forbids it to.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
from collections.abc import Sequence

import numpy as np
import PIL.Image

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --card: #f6f7f8; --ink: #22303c; --soft: #5b6a76; --grid: #d5dbe0;
  --c1: #0b6e99; --c2: #d9730d; --c3: #2f7d4f; --c4: #9065b0; --c5: #c14c8a; --c6: #6b6a66; --c7: #a8781e;
  --c8: #2a4fb3; }
@media (prefers-color-scheme: dark) { :root { --page: #14191d; --card: #1d242a; --ink: #e4e9ed; --soft: #a3b0ba;
  --grid: #3a454e; --c1: #58b3dc; --c2: #f2994a; --c3: #6fc18e; --c4: #bf9ae0; --c5: #ec84b9; --c6: #b5b3ad;
  --c7: #d8b25c; --c8: #8ba6f5; } }
@media print { :root { color-scheme: light; --page: #ffffff; --card: #ffffff; --ink: #000000; --soft: #333333;
  --grid: #cccccc; --c1: #0b6e99; --c2: #b35c07; --c3: #2f7d4f; --c4: #75479a; --c5: #a83472; --c6: #555555;
  --c7: #80590f; --c8: #2a4fb3; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; padding-top: .6rem; border-top: 1px solid var(--grid); }
p, li { max-width: 75ch; }
.soft, figcaption { color: var(--soft); font-size: .875rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1rem; list-style: none; padding: 0; margin: .6rem 0; }
a { color: var(--c1); }
.numbers { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0; padding: 0; }
.numbers div { background: var(--card); border: 1px solid var(--grid); border-radius: 8px; padding: .5rem .9rem; }
.numbers dt { color: var(--soft); font-size: .8rem; }
.numbers dd { margin: 0; font-size: 1.25rem; font-weight: 600; }
.cards { columns: 2 400px; column-gap: .9rem; margin: .8rem 0; }
figure { break-inside: avoid; max-width: 540px; margin: 0 0 .9rem; background: var(--card);
  border: 1px solid var(--grid); border-radius: 8px; padding: .7rem; }
figure > h3 { margin: 0 0 .4rem; font-size: .95rem; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { margin-top: .4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding: .3rem 0; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
table.matrix td { text-align: center; padding: .2rem .35rem; min-width: 2.1rem; border: 1px solid var(--page);
  background: color-mix(in srgb, var(--c1) calc(var(--v) * 50%), var(--card)); }
table.matrix th { padding: .2rem .35rem; font-weight: 500; }
table.matrix thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; border: 0; }
table.matrix thead th:first-child { writing-mode: horizontal-tb; transform: none; vertical-align: bottom; }
.missing { background: var(--card); border-left: 4px solid var(--c2); padding: .6rem .9rem; }
.film { display: flex; flex-wrap: wrap; gap: 4px; }
.film span { display: flex; flex-direction: column; align-items: center; font-size: .75rem; color: var(--soft); }
.film img, img.one { image-rendering: pixelated; border: 1px solid var(--grid); background: var(--page); }
.film img { width: 96px; height: auto; }
.film.alive span { display: none; }
.film.alive span.now { display: flex; width: 100%; }
.film.alive span.now img { width: min(100%, 340px); }
img.one { width: min(100%, 220px); height: auto; }
.player { display: flex; gap: .6rem; align-items: center; margin-top: .5rem; }
.player button { font: inherit; padding: .2rem .9rem; border: 1px solid var(--ink); border-radius: 6px;
  background: var(--page); color: var(--ink); cursor: pointer; }
.player input { flex: 1; min-width: 6rem; accent-color: var(--c1); }
@media print {
  nav, .player { display: none; }
  main { max-width: none; padding: 0; }
  figure, tr, .numbers div { break-inside: avoid; }
  h2 { break-after: avoid; }
  .cards { columns: 2; }
  .film.alive span, .film.alive span.now { display: flex; width: auto; }
  .film.alive span.now img, .film img { width: 72px; }
  .scroll { overflow: visible; }
  th, td { white-space: normal; }
  table { font-size: .7rem; }
  * { print-color-adjust: exact; }
}
"""

_SCRIPT = """
document.querySelectorAll(".film").forEach(function (film) {
  var frames = Array.from(film.children), now = 0, timer = null;
  if (frames.length < 2) { return; }
  var player = document.createElement("div"), button = document.createElement("button");
  var slider = document.createElement("input");
  player.className = "player";
  button.type = "button";
  slider.type = "range"; slider.min = 1; slider.max = frames.length;
  slider.setAttribute("aria-label", "time step");
  function show(index) {
    now = index;
    frames.forEach(function (frame, i) { frame.classList.toggle("now", i === now); });
    slider.value = now + 1;
  }
  function stop() { clearInterval(timer); timer = null; button.textContent = "Play"; }
  button.addEventListener("click", function () {
    if (timer !== null) { stop(); return; }
    button.textContent = "Pause";
    timer = setInterval(function () { show((now + 1) % frames.length); }, 350);
  });
  slider.addEventListener("input", function () { stop(); show(slider.value - 1); });
  film.classList.add("alive");
  player.append(button, slider);
  film.after(player);
  stop();
  show(0);
});
"""


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        key: Its name in links, and in the page's data.
        title: Its heading.
        body: Its HTML.
    """

    key: str
    title: str
    body: str


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The whole page.

    Args:
        title: Its heading, as text.
        subtitle: Below it, as text.
        sections: Its parts, in order.
    """
    links = "".join(f'<li><a href="#{part.key}">{html.escape(part.title)}</a></li>' for part in sections)
    parts = "\n".join(
        f'<section id="{part.key}">\n<h2>{html.escape(part.title)}</h2>\n{part.body}\n</section>' for part in sections
    )
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{html.escape(title)}</h1>
<p class="soft">{html.escape(subtitle)}</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
{parts}
</main>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def figure(title: str, picture: str, caption: str = "") -> str:
    """A picture, or a table, with a heading and a caption.

    Args:
        title: As text.
        picture: HTML.
        caption: As text.
    """
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure><h3>{html.escape(title)}</h3>{picture}{below}</figure>"


def cards(*figures: str) -> str:
    """Figures side by side, where there is room."""
    return f'<div class="cards">{"".join(figures)}</div>'


def paragraph(text: str) -> str:
    """Text."""
    return f"<p>{html.escape(text)}</p>"


def missing(text: str) -> str:
    """What a section says that has nothing to show."""
    return f'<p class="missing">{html.escape(text)}</p>'


def numbers(values: Sequence[tuple[str, str]]) -> str:
    """Names and values, large."""
    each = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in values)
    return f'<dl class="numbers">{each}</dl>'


def bullets(sentences: Sequence[str]) -> str:
    """A list of sentences."""
    return f"<ul>{''.join(f'<li>{html.escape(sentence)}</li>' for sentence in sentences)}</ul>"


def table(heading: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table that scrolls sideways where it is too wide.

    Args:
        heading: Of the columns, as text.
        rows: Cells, as text.
        caption: Above it, as text.
    """
    above = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in heading)
    body = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(c)}</td>" for c in row[1:])
        + "</tr>"
        for row in rows
    )
    return _scroll(
        f"<table>{above}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>", caption or ", ".join(heading)
    )


def matrix(names: Sequence[str], counts: np.ndarray, caption: str) -> str:
    """A confusion matrix as a table whose cells are the darker the more there are in their row.

    Args:
        names: Of the classes.
        counts: Rows are what was true, columns what was answered; whole numbers (classes, classes).
        caption: Above it, as text.
    """
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in names)
    parts = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    rows = []
    for name, row, shades in zip(names, counts, parts, strict=True):
        cells = "".join(f'<td style="--v:{v:.3f}">{n or ""}</td>' for n, v in zip(row, shades, strict=True))
        rows.append(f'<tr><th scope="row">{html.escape(name)}</th>{cells}</tr>')
    return _scroll(
        f'<table class="matrix"><caption>{html.escape(caption)}</caption><thead><tr>'
        f'<th scope="col">true, answered</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>',
        caption,
    )


def _scroll(content: str, label: str) -> str:
    """What scrolls sideways; by keys too, so it takes the focus and says what it is."""
    name = html.escape(label, quote=True)
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{name}">{content}</div>'


def image(pixels: np.ndarray, alt: str) -> str:
    """A picture as PNG in the page.

    Args:
        pixels: uint8 of shape (height, width, 3 or 4).
        alt: What it shows, in words.
    """
    return f'<img class="one" src="{_data(pixels)}" alt="{html.escape(alt, quote=True)}">'


def film(frames: Sequence[np.ndarray], alt: str) -> str:
    """Frames that play one after another where scripts run, and stand side by side where not, and on paper.

    Args:
        frames: uint8, each of shape (height, width, 4).
        alt: What they show, in words; the number of the frame is added.
    """
    spans = (
        f'<span><img src="{_data(frame)}" alt="{html.escape(alt, quote=True)}, step {number} of {len(frames)}">'
        f"step {number}</span>"
        for number, frame in enumerate(frames, start=1)
    )
    return f'<div class="film">{"".join(spans)}</div>'


def _data(pixels: np.ndarray) -> str:
    written = io.BytesIO()
    PIL.Image.fromarray(pixels).save(written, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"
