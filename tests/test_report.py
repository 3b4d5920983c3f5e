"""The page of a run: its numbers, what it says of what is missing, and how it looks in a real browser."""

from __future__ import annotations

import csv
import dataclasses
import html.parser
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_dsr import analysis, cli, recipes, report, training

tf = pytest.importorskip("tensorflow")
pytestmark = pytest.mark.tensorflow_only

TINY = dataclasses.replace(
    recipes.get("digits"), widths=(4, 6), timesteps=3, epochs=2, batch_size=16, train_examples=64, hybrid_epochs=1,
    hybrid_learning_rate=0.05,
)  # fmt: skip
EVENTS = dataclasses.replace(
    recipes.get("digits-events"), epochs=1, timesteps=2, train_examples=32, batch_size=16, threshold=0.5
)
SECTIONS = [
    "overview",
    "training",
    "thresholds",
    "confusion",
    "firing",
    "errors",
    "anytime",
    "energy",
    "spikes",
    "events",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of images, and its report."""
    folder = tmp_path_factory.mktemp("images") / "run"
    training.train(TINY, folder, verbose=0)
    return folder, report.write(folder, examples=40)


@pytest.fixture(scope="module")
def event_run(tmp_path_factory):
    """A finished run of event streams, and its report."""
    folder = tmp_path_factory.mktemp("events") / "run"
    training.train(EVENTS, folder, verbose=0)
    return folder, report.write(folder, examples=20)


class Page(html.parser.HTMLParser):
    """What is in a page: tags with their attributes, the text, and what was opened and not closed."""

    _ALONE = ("meta", "link", "img", "input", "br", "path", "use", "line", "rect", "circle")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self._ALONE:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self._ALONE:
            assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_page_is_whole_and_needs_nothing_else(run):
    _, written = run
    assert written.missing == {}
    text = written.html.read_text()
    page = Page(text)
    assert page.open == []
    assert [each["id"] for each in page.all("section")] == SECTIONS
    for picture in page.all("svg"):
        assert picture["role"] == "img"
        assert len(picture["aria-label"]) > 30
    for picture in page.all("img"):
        assert picture["src"].startswith("data:image/png;base64,")
        assert len(picture["alt"]) > 10
    assert len(page.all("svg")) >= 12
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)), "ids are unique"
    pointed = re.findall(r'(?:url\(#|href="#)([^)"]+)', text)
    assert pointed
    assert set(pointed) <= set(ids)
    # Nothing that is loaded from elsewhere; names of XML's namespaces are no addresses.
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)
    assert not re.findall(r"https?://(?!www\.w3\.org/)", text)
    assert "@import" not in text
    assert "default-src 'none'" in text


def test_the_figures_are_those_of_the_run(run):
    folder, written = run
    figures = json.loads(written.json.read_text())
    assert list(figures) == ["written_by", "recipe", *SECTIONS]
    rows = list(csv.DictReader((folder / "history.csv").read_text().splitlines()))
    assert figures["training"]["val_accuracy"] == [float(row["val_accuracy"]) for row in rows]
    assert figures["training"]["stages"] == ["representation", "spiking", "spiking"]
    assert figures["thresholds"]["neuron1"] == [float(row["threshold_neuron1"]) for row in rows]
    model = keras.models.load_model(folder / "model.keras")
    loaded = training.load(TINY)
    batches = list(loaded.batches(loaded.test, 64, seed=0).take(1).as_numpy_iterator())
    x, labels = (np.concatenate(each)[:40] for each in zip(*batches, strict=True))
    answers = model.predict(x, verbose=0).argmax(axis=1)
    counts = np.array(figures["confusion"]["counts"])
    assert counts.sum() == 40
    assert np.trace(counts) == (answers == labels).sum()
    by_hand = np.zeros_like(counts)
    for true, answer in zip(labels, answers, strict=True):
        by_hand[true, answer] += 1
    np.testing.assert_array_equal(counts, by_hand)
    assert figures["anytime"]["accuracy_by_step"][-1] == pytest.approx((answers == labels).mean())
    traced = analysis.trace(model, x)
    for name, layer in traced.layers.items():
        assert figures["firing"]["layers"][name]["firing_rate"] == pytest.approx(layer.firing_rate)
    counted = analysis.count_operations(model, x)
    assert figures["energy"]["synops"] == pytest.approx(counted.synops)
    joules = {(each["hardware"], each["with_memory"]): each["joules"] for each in figures["energy"]["estimates"]}
    assert joules["loihi", False] == pytest.approx(analysis.estimate(counted, "loihi").joules)
    assert joules["45nm-int8", True] == pytest.approx(analysis.estimate(counted, "45nm-int8", True).joules)
    assert len(figures["errors"]["layers"]["neuron1"]["by_steps"]) == 3
    assert figures["errors"]["proposed_alpha"]["alpha"] == 0.5
    assert figures["overview"]["summary"]["test_examples"] == len(loaded.test)


def test_event_streams_are_animated(event_run):
    _, written = event_run
    assert written.missing == {}
    page = Page(written.html.read_text())
    frames = [each for each in page.all("img") if "Events of a test recording" in each["alt"]]
    assert [each["alt"].rpartition(", ")[2] for each in frames] == ["step 1 of 2", "step 2 of 2"]
    assert frames[0]["src"] != frames[1]["src"]
    events = json.loads(written.json.read_text())["events"]["events_per_step"]
    assert len(events) == 2
    assert min(events) > 0


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the run, without its report."""
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder, ignore=shutil.ignore_patterns("report.*"))
    return folder


BOTH = {"history.csv": ["Training", "Thresholds"], "model.keras": ["Firing rates", "Energy", "Confusion matrix"]}


def test_a_section_says_what_it_lacks(copied, capsys):
    """Of a run that is not finished: nothing is run, so the whole report is cheap."""
    for name in BOTH:
        (copied / name).unlink()
    assert cli.main(["report", str(copied), "--examples", "10"]) == 0
    told = capsys.readouterr()
    page = Page((copied / "report.html").read_text())
    text = " ".join(page.texts)
    assert "keras-dsr resume" in text
    for name, titles in BOTH.items():
        assert f"no {name}" in text
        for title in titles:
            assert f"{title} is left out. The run folder has no {name}" in told.err
    assert [each["id"] for each in page.all("section")] == SECTIONS
    figures = json.loads((copied / "report.json").read_text())
    assert {key for key, value in figures.items() if "missing" in value} == set(SECTIONS) - {"overview"}
    assert "test accuracy" in text
    assert f"Written: {copied / 'report.html'}" in told.out


def section(folder, key):
    """What one section of a run's report has."""
    (make,) = (make for name, _, make in report._SECTIONS if name == key)
    return make(report._Run(folder, None, 10))


def damage_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("other.json", "{}")


DAMAGED = {
    "history without stages": ("history.csv", "training", lambda path: path.write_text("a,b\n1,2\n")),
    "history of no numbers": ("history.csv", "training", lambda path: path.write_text("stage,loss\nspiking,low\n")),
    "binary history": ("history.csv", "thresholds", lambda path: path.write_bytes(bytes(range(256)))),
    "history with a NUL": ("history.csv", "training", lambda path: path.write_bytes(b"stage,loss\n\0,1\n\xff")),
    "no summary": ("summary.json", "overview", lambda path: path.write_text("{}")),
    "summary of no numbers": (
        "summary.json",
        "overview",
        lambda path: path.write_text(path.read_text().replace('"test_accuracy": ', '"test_accuracy": "much", "x": ')),
    ),
    "environment": ("environment.json", "overview", lambda path: path.write_text("{")),
    "empty environment": ("environment.json", "overview", lambda path: path.write_text("{}")),
    "environment of another kind": ("environment.json", "overview", lambda path: path.write_text("[1]")),
    "model": ("model.keras", "energy", lambda path: path.write_text("{}\n{}")),
    "zip that is no model": ("model.keras", "firing", damage_zip),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_section_says_what_is_damaged(copied, what):
    name, key, damage = DAMAGED[what]
    damage(copied / name)
    if key == "overview":  # which has the recipe in any case
        body, _ = section(copied, key)
        assert f"{name} is damaged, or not" in body
        assert "digits" in body
    else:
        with pytest.raises(report._Missing, match=rf"{name} is damaged, or not"):
            section(copied, key)


@pytest.mark.parametrize("data", ["folder:/nowhere", "no such data"])
def test_a_data_set_that_is_not_there(copied, data):
    settings = json.loads((copied / "recipe.json").read_text())
    (copied / "recipe.json").write_text(json.dumps({**settings, "data": data}))
    for key in ("firing", "anytime", "errors", "energy", "confusion", "spikes", "events"):
        with pytest.raises(report._Missing, match="is not at hand"):
            section(copied, key)
    assert "accuracy" in section(copied, "training")[1]


def test_what_goes_wrong_inside_is_said(copied, monkeypatch):
    """A model that cannot be counted or stepped, and a data set that breaks while it is read."""

    def refuse(*_, **__):
        raise ValueError("It is of another kind.")

    run = report._Run(copied, None, 10)
    for module, name in (
        (report, "count_operations"),
        (report.anytime, "outputs_by_step"),
        (report.representation, "errors"),
    ):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(report.tracing, "trace", refuse)
    for make in (report._energy, report._anytime, report._firing, report._errors):
        with pytest.raises(report._Missing, match=r"cannot be looked into so\. It is of another kind"):
            make(run)
    broken = report._Run(copied, None, 10)
    monkeypatch.setattr(type(broken.data), "batches", lambda *_, **__: tf.data.Dataset.from_generator(
        refuse, output_types=(tf.float32, tf.int64)))  # fmt: skip
    with pytest.raises(report._Missing, match="'digits' cannot be read"):
        broken.test  # noqa: B018


def test_other_files_are_not_overwritten(copied):
    before = (copied / "recipe.json").read_bytes()
    with pytest.raises(ValueError, match=r"recipe\.json, which exists and is not a report's"):
        report.write(copied, to=copied / "recipe.html")
    assert (copied / "recipe.json").read_bytes() == before
    (copied / "model.keras").unlink()
    for _ in range(2):  # a report takes the place of one
        report.write(copied, to=copied / "mine.html")


def test_bad_input(copied, tmp_path, capsys):
    for arguments, message in (
        ([str(tmp_path)], "is not the folder of a run: it has no recipe.json"),
        ([str(copied), "--examples", "0"], "at least 1. Received examples=0"),
        ([str(copied), "--to", str(tmp_path / "page.pdf")], "A report is an .html file"),
    ):
        assert cli.main(["report", *arguments]) == 1
        assert message in capsys.readouterr().err


def test_the_report_is_written_where_it_is_wanted(copied, tmp_path):
    (copied / "model.keras").unlink()
    written = report.write(copied, examples=10, to=tmp_path / "pages" / "mine.html")
    assert written.html.parent == tmp_path / "pages"
    assert sorted(path.name for path in written.html.parent.iterdir()) == ["mine.html", "mine.json"]


@pytest.fixture(scope="module")
def browser():
    """A real Chromium, headless; skips the test where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
    known = [
        os.environ.get("KERAS_DSR_CHROMIUM"),
        *map(shutil.which, ("chromium", "chromium-browser", "google-chrome")),
    ]
    path = next((each for each in known if each and Path(each).exists()), None)
    with api.sync_playwright() as playwright:
        if path is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("there is no Chromium: install one, or name it in KERAS_DSR_CHROMIUM")
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


# For each figure whether it has a size and lies within the page, and what else tells that the page is seen whole.
LOOK = """() => ({
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  pictures: Array.from(document.querySelectorAll("figure svg, figure img")).filter(
    (each) => each.closest(".film span:not(.now)") === null).map((each) => {
      const box = each.getBoundingClientRect();
      return [box.width > 60, box.height > 60, box.left >= 0, box.right <= window.innerWidth + 1,
              each.tagName !== "IMG" || each.naturalWidth > 0].every(Boolean) || each.outerHTML.slice(0, 300); }),
  clipped: Array.from(document.querySelectorAll("figure svg")).filter((svg) => {
      const outer = svg.getBoundingClientRect();
      return Array.from(svg.querySelectorAll("text")).some((text) => {
        const box = text.getBoundingClientRect();
        return box.left < outer.left - 8 || box.right > outer.right + 8; });
      }).map((svg) => svg.getAttribute("aria-label")),
  smallest: Math.min(...Array.from(document.querySelectorAll("figure svg text")).map(
      (text) => text.getBoundingClientRect().height)),
  background: getComputedStyle(document.body).backgroundColor,
  ink: getComputedStyle(document.querySelector("figure svg text")).fill,
})"""


@pytest.mark.parametrize("kind", ["run", "event_run"])
@pytest.mark.parametrize("size", [(1280, 900), (375, 700)], ids=["desk", "phone"])
def test_a_browser_shows_all_of_it(kind, size, browser, request, tmp_path):
    _, written = request.getfixturevalue(kind)
    said, asked = [], []
    looks = {}
    for scheme in ("light", "dark"):
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, offline=True)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda sent: asked.append(sent.url))
        page.goto(written.html.as_uri())
        looks[scheme] = page.evaluate(LOOK)
        page.screenshot(path=tmp_path / f"{scheme}.png", full_page=True)
        assert (tmp_path / f"{scheme}.png").stat().st_size > 50_000
        # The animation plays, and stops.
        now = page.locator(".film .now")
        assert now.text_content() == "step 1"
        page.get_by_role("button", name="Play").first.click()
        page.locator(".film .now", has_text="step 2").wait_for()
        page.get_by_role("button", name="Pause").first.click()
        context.close()
    assert said == []
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    assert [url for url in asked if url.startswith("file")] == [written.html.as_uri()] * 2
    for look in looks.values():
        assert look["wide"] <= 0, "the page does not scroll sideways"
        assert look["pictures"]
        assert all(each is True for each in look["pictures"]), look["pictures"]
        assert look["clipped"] == []
        assert look["smallest"] >= 9
    assert looks["light"]["background"] != looks["dark"]["background"]
    assert looks["light"]["ink"] != looks["dark"]["ink"]


def test_it_prints_with_every_frame(event_run, browser, tmp_path):
    _, written = event_run
    page = browser.new_page()
    page.goto(written.html.as_uri())
    page.emulate_media(media="print")
    seen = "Array.from(document.querySelectorAll('.film img')).every((each) => each.getBoundingClientRect().width > 20)"
    assert page.evaluate(seen)
    assert not page.get_by_role("button", name="Play").first.is_visible()
    page.pdf(path=tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    page.close()
