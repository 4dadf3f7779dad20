"""The page of a report: what it holds, and what a browser makes of it."""

from __future__ import annotations

import dataclasses
import html.parser
import math
import random
import shutil
import subprocess
from collections import Counter

import pytest
from matplotlib.image import imread
from support.reports import report_of, tensor_row

from hf_sai.report.html import MAX_KINDS, colour_of
from hf_sai.report.rows import RouteRow


CHROME = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(CHROME is None, reason="no chromium or chrome is installed")
EVIL = "head.<script>alert(1)</script>\"'&amp;.weight"


@pytest.fixture(scope="module")
def small():
    """Two layers with A pending, a given and a fallback tensor with a name that is markup, and a history."""
    rows = [tensor_row(f"layers.{layer}.q.lora_A.weight", layer, (2, 16), 0.0, "pending") for layer in (0, 1)]
    rows += [tensor_row(f"layers.{layer}.q.lora_B.weight", layer, (16, 2), 1.0 + 0.5 * layer) for layer in (0, 1)]
    rows += [tensor_row(EVIL, None, (), 1.0, "fallback"), tensor_row("norm.weight", None, (9,), 1.2, "given")]
    names = [row.name for row in rows if row.status == "measured"]
    history = [{"step": step, "gsnr": dict.fromkeys(names, 4.0 * step)} for step in (2, 4, 8)]
    return report_of(rows, history=history)


@pytest.fixture(scope="module")
def swan():
    routes = [
        RouteRow("layers.0.q.weight", "q", 0, (16, 16), 256, "matrix", "linear layer"),
        RouteRow("embed.weight", "embed", None, (32, 16), 512, "adam", "embedding"),
    ]
    return dataclasses.replace(report_of([]), optimizer="swan", tensors=[], routes=routes, schedule=[])


class Page(html.parser.HTMLParser):
    """Tags with attributes, and the texts of table cells by table, row and column."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self._cell, self.facts, self._in = [], {}, None, [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._in = tag
        if tag == "table":
            self.rows = self.tables.setdefault(dict(attributes).get("id"), [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = self.rows[-1]

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = None

    def handle_data(self, data):
        if self._in == "dt" and data.strip():
            self.facts.append((data, ""))
        if self._in == "dd" and data.strip():
            self.facts[-1] = (self.facts[-1][0], data)
        if self._cell is not None:
            self._cell[-1] += data

    def all(self, tag, **wanted):
        return [each for name, each in self.tags if name == tag and wanted.items() <= each.items()]


def test_the_page_holds_every_tensor_by_value(small):
    rows = Page(small.to_html()).tables["tensors"]
    head, *body = [[cell.strip() for cell in row] for row in rows]
    assert head == ["tensor", "scale", "g-SNR / sqrt(n)", "g-SNR", "learning rate", "layer", "shape", "step", "status"]
    assert body == [
        ["layers.0.q.lora_A.weight", "", "", "", "", "0", "2x16", "", "pending"],
        ["layers.1.q.lora_A.weight", "", "", "", "", "1", "2x16", "", "pending"],
        ["layers.0.q.lora_B.weight", "5.657", "1.0000", "5.6569", "0.2828 to 0.5657", "0", "16x2", "1", "measured"],
        ["layers.1.q.lora_B.weight", "8.485", "1.5000", "8.4853", "0.4243 to 0.8485", "1", "16x2", "1", "measured"],
        [EVIL, "1", "1.0000", "1", "0.05 to 0.1", "", "scalar", "1", "fallback"],
        ["norm.weight", "3.6", "1.2000", "3.6", "0.18 to 0.36", "", "9", "1", "given"],
    ]


def test_page_and_markdown_say_the_same_facts_by_value(small, swan):
    expected = {
        "learning rate (peak)": "0.1",
        "weight decay": "0",
        "tensors": "2 measured, 1 given, 1 fallback, 2 pending",
        "scale": "1 to 8.485",
        "g-SNR / sqrt(numel)": "1 to 1.5",
        "learning rate x scale": "0.05 to 0.8485",
        "optimizer state": "3 MB (AdamW: 6 MB)",
    }
    assert dict(Page(small.to_html()).facts) == expected
    assert small.to_markdown().splitlines()[4:11] == [f"| {name} | {value} |" for name, value in expected.items()]
    routed = {"tensors": "1 whitened (33.3% of the elements), 1 to Adam"}
    assert dict(Page(swan.to_html()).facts) == {
        name: {**expected, **routed}[name]
        for name in ("learning rate (peak)", "weight decay", "tensors", "optimizer state")
    }


@pytest.mark.parametrize(
    ("schedule", "note"),
    [([0.5, 1.0], "times scale, from the lowest to the highest of the schedule."), ([], "times scale, at the peak.")],
)
def test_a_note_on_learning_rates_stands_where_there_are_scales(small, swan, schedule, note):
    assert note in dataclasses.replace(small, schedule=schedule).to_html()
    assert "times scale" not in dataclasses.replace(swan, schedule=schedule).to_html()


def test_a_name_that_is_markup_stays_text_and_nothing_is_fetched(small):
    page = Page(small.to_html())
    assert len(page.all("script")) == 1
    assert "alert(1)</script>" not in small.to_html()
    fetching = {"src", "href", "action", "data", "srcset", "xlink:href"}
    assert [tag for tag, attributes in page.tags if fetching & attributes.keys()] == []
    assert "url(" not in small.to_html().replace("url(#hatch)", "")
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy.startswith("default-src 'none'; ")


def test_the_map_has_a_cell_per_kind_and_layer_with_its_colour(small):
    cells = [each for each in Page(small.to_html()).all("rect") if each.get("class")]
    limits = (1.0, math.sqrt(72))
    assert [(each["class"], each.get("fill")) for each in cells] == [
        ("pending", None),
        ("pending", None),
        ("settled", colour_of(math.sqrt(32), limits)),
        ("settled", "#fde725"),  # the largest
        ("fallback", "#440154"),  # the smallest
        ("settled", colour_of(3.6, limits)),
    ]
    assert len({(each["x"], each["y"]) for each in cells}) == 6


def test_colours_go_through_the_logarithm():
    assert [colour_of(scale, (1.0, 32.0)) for scale in (1.0, 2.0, 16.0, 32.0)] == [
        "#440154", "#414487", "#7ad151", "#fde725"
    ]  # fmt: skip


def test_marks_stand_higher_the_larger_the_ratio(small):
    marks = [each for each in Page(small.to_html()).all("circle") if each.get("class")]
    assert [each["class"] for each in marks] == ["measured", "measured", "fallback", "given"]
    heights = [float(each["cy"]) for each in marks]
    assert heights[1] < heights[3] < heights[0] == heights[2]
    lines = [each for each in Page(small.to_html()).all("line") if float(each["y1"]) == heights[0]]
    assert len(lines) == 1  # that of the ratio 1


def test_history_is_one_line_with_its_marks(small):
    page = Page(small.to_html())
    assert len(page.all("polyline")) == 1
    marks = [each for each in page.all("circle") if not each.get("class")]
    assert [float(each["cx"]) for each in marks] == [46.0, pytest.approx(277.3, abs=0.1), 740.0]
    assert Page(dataclasses.replace(small, history=[]).to_html()).all("polyline") == []


def test_swans_page_has_routes_and_no_scales(swan):
    page = Page(swan.to_html())
    assert [[cell.strip() for cell in row] for row in page.tables["tensors"]] == [
        ["tensor", "layer", "shape", "elements", "route", "why"],
        ["layers.0.q.weight", "0", "16x16", "256", "matrix", "linear layer"],
        ["embed.weight", "", "32x16", "512", "adam", "embedding"],
    ]
    assert [row[4].strip() for row in page.tables["routes"]] == ["share of the elements", "33%", "67%"]
    assert [each["class"] for each in page.all("rect") if each.get("class")] == ["whitened", "adam"]
    assert page.all("circle") == []
    widths = [each["style"] for each in page.all("i") if each.get("class", "").startswith("bar")]
    assert widths[:2] == ["width: 37.50%", "width: 75.00%"]  # state against AdamW's: a half


def test_a_report_of_nothing_is_a_page():
    assert Page(report_of([]).to_html()).tables["tensors"][1:] == []


def test_what_is_too_much_for_a_page_is_said(monkeypatch):
    monkeypatch.setattr("hf_sai.report.html.MAX_ROWS", 100)
    rows = [tensor_row(f"layers.0.expert{i}.weight", 0, (4, 4), 1.0) for i in range(1001)]
    text = report_of(rows).to_html()
    assert len(Page(text).tables["tensors"]) == 101  # with the head
    assert "The first 100 of 1,001; gsnr_report.json has all." in text
    assert f"{1001 - MAX_KINDS} more kinds stand in the table only." in text


# ---- in a browser ----


def browse(folder, text, *options):
    """A headless browser's output for a page."""
    (folder / "page.html").write_text(text, encoding="utf-8")
    command = [CHROME, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]
    command += ["--hide-scrollbars", "--disable-dev-shm-usage", *options, f"file://{folder}/page.html"]
    done = subprocess.run(command, capture_output=True, timeout=240, check=True)
    return done.stdout.decode()


@pytest.mark.slow
@needs_browser
def test_2000_tensors_are_sorted_filtered_and_drawn_by_a_browser(tmp_path):
    rng = random.Random(0)
    rows = [
        tensor_row(f"layers.{layer}.kind_{kind}.weight", layer, (8, kind + 1), 1.0 + rng.random())
        if (layer, kind) != (7, 3)
        else tensor_row("layers.7.kind_3.weight", 7, (8, 4), 0.0, "pending")
        for layer in range(100)
        for kind in range(20)
    ]
    click = """<script>
    const button = [...document.querySelectorAll("th button")].find(each => each.textContent === "scale");
    button.click();
    document.body.dataset.ascending = [...document.querySelectorAll("#tensors td:first-child")].map(
      each => each.textContent).join(" ");
    button.click();
    const box = document.getElementById("filter");
    box.value = "KIND_3.";
    box.dispatchEvent(new Event("input"));
    document.querySelector("#depth circle").dispatchEvent(
      new PointerEvent("pointerover", { bubbles: true, clientX: 5, clientY: 5 }));
    </script></body>"""
    page = Page(browse(tmp_path, report_of(rows).to_html().replace("</body>", click), "--dump-dom"))
    scales = {row.name: row.scale for row in rows if row.status != "pending"}
    names = [row[0] for row in page.tables["tensors"][1:]]
    upwards = sorted(scales, key=scales.get)
    assert names == [*upwards[::-1], "layers.7.kind_3.weight"]  # what is pending is last in both directions
    assert page.all("body")[0]["data-ascending"].split() == [*upwards, "layers.7.kind_3.weight"]
    assert [each.get("aria-sort") for each in page.all("th", scope="col")][:3] == [None, "descending", None]
    body = [attributes for tag, attributes in page.tags if tag == "tr"][1:2001]
    assert sum("hidden" not in each for each in body) == 100
    assert len(page.all("circle", **{"class": "measured"})) == 1999
    assert len([each for each in page.all("rect") if each.get("class") == "settled"]) == 1999
    assert len([each for each in page.all("rect") if each.get("class") == "pending"]) == 1
    assert "hidden" not in page.all("div", id="tip")[0]
    assert page.all("circle")[0]["data-tip"].startswith(f"layers.0.kind_0.weight: scale {rows[0].scale:.4g}, ")


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize(("scheme", "back"), [("1", "#ffffff"), ("0", "#0f1419")])
def test_a_screenshot_shows_table_and_pictures(scheme, back, small, tmp_path):
    picture = tmp_path / "page.png"
    options = (f"--screenshot={picture}", "--window-size=800,1700", f"--blink-settings=preferredColorScheme={scheme}")
    browse(tmp_path, small.to_html(), *options)
    pixels = (imread(picture)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    shown = Counter("#{:02x}{:02x}{:02x}".format(*pixel) for pixel in pixels.tolist())
    assert max(shown, key=shown.get) == back
    assert shown["#fde725"] > 100  # the cell of the largest scale
    assert shown["#440154"] > 100
    assert len(shown) > 50  # letters
