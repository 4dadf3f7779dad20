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
from hf_sai.report.quantities import folded, theory
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
        self.tags, self.tables, self._cell, self.facts, self._in, self.shown = [], {}, None, [], None, ""
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
        if self.tags and self.tags[-1][1].get("id") == "shown":
            self.shown += data
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
    assert head == [
        "tensor", "update / weight", "learning rate", "scale", "g-SNR / sqrt(n)", "g-SNR", "update (RMS)",
        "weight (RMS)", "layer", "shape", "step", "status",
    ]  # fmt: skip
    empty, names = [""] * 7, [f"layers.{layer}.q.lora_B.weight" for layer in (0, 1)]
    assert body == [
        ["layers.0.q.lora_A.weight", *empty, "0", "2x16", "", "pending"],
        ["layers.1.q.lora_A.weight", *empty, "1", "2x16", "", "pending"],
        [names[0], "", "0.2828 to 0.5657", "5.657", "1.0000", "5.6569", "", "", "0", "16x2", "1", "measured"],
        [names[1], "", "0.4243 to 0.8485", "8.485", "1.5000", "8.4853", "", "", "1", "16x2", "1", "measured"],
        [EVIL, "", "0.05 to 0.1", "1", "1.0000", "1", "", "", "", "scalar", "1", "fallback"],
        ["norm.weight", "", "0.18 to 0.36", "3.6", "1.2000", "3.6", "", "", "", "9", "1", "given"],
    ]  # fmt: skip


@pytest.fixture(scope="module")
def moved():
    """Of each B the update is known, of one what share of its weights; names that begin alike; a title."""
    start = "base_model.model.model.layers"
    rows = [tensor_row(f"{start}.0.q.lora_A.default.weight", 0, (2, 8), 0.0, "pending", kind="q.lora_A")]
    for layer, weight in ((0, 0.0), (1, 0.5)):
        row = tensor_row(f"{start}.{layer}.q.lora_B.default.weight", layer, (8, 2), 1.0, kind="q.lora_B")
        rows.append(dataclasses.replace(row, gradient_norm=2.0 + layer, weight_rms=weight, factor=0.5))
    rows.append(tensor_row("head.weight", None, (4, 4), 1.0))
    run = {"model": "LlamaForCausalLM, user/base", "date": "2026-11-26", "repository": "user/run", "seed": 1}
    return report_of(rows, run=run, schedule=[])


def test_the_page_says_what_moved_how_far_from_what_on(moved):
    """The learning rate is 0.4 (0.1 times sqrt(16)), so that B moves by 0.4 * norm / sqrt(16) in the mean."""
    page = Page(moved.to_html())
    assert [[row[0], row[1], row[2], row[6], row[7]] for row in page.tables["tensors"][1:]] == [
        ["…\u20600.q.lora_A.default.weight", "", "", "", ""],
        ["…\u20600.q.lora_B.default.weight", "from 0", "0.4", "0.2", ""],
        ["…\u20601.q.lora_B.default.weight", "0.6", "0.4", "0.3", "0.5"],
        ["head.weight", "", "0.4", "", ""],
    ]
    cells = {each.get("class"): each.get("fill") for each in page.all("rect") if each.get("class")}
    assert cells["pending"] is None
    low, high = 0.2 / math.sqrt(4 / 1.5), 0.3 * math.sqrt(4 / 1.5)  # a factor of 1.5 is not blown up to all colours
    fills = [each["fill"] for each in page.all("rect") if each.get("class") == "settled" and "fill" in each]
    assert fills == [colour_of(0.2, (low, high)), colour_of(0.3, (low, high))]
    text = moved.to_html()
    for said in (
        "How far the first step moves each module, by depth",
        "Names begin with <b>base_model.model.model.layers.</b>",
        '<p class="origin">LlamaForCausalLM, user/base, 2026-11-26, user/run</p>',
        "1 / the norm of the gradient, or of the pair&#39;s first where that is larger, and for A 0.3 times that",
    ):
        assert said in text
    assert "lora_policy=paired" not in dataclasses.replace(moved, tensors=moved.tensors[3:]).to_html()


def test_text_and_markdown_say_it_too(moved):
    lines = [" ".join(line.split()) for line in moved.to_text().splitlines()]
    assert "LlamaForCausalLM, user/base, 2026-11-26, user/run" in lines
    assert "q.lora_B 2 8x2 0.3 0.4 4 1" in lines  # the upper median
    assert "q.lora_A 1 2x8 - - - pending" in lines
    assert "| q.lora_B | 2 | 8x2 | 0.6 | 0.3 | 0.4 | 0.4 to 0.4 | 4 | 1.000 | 1 | measured |" in moved.to_markdown()
    assert "| update / weight | 0.6 |" in moved.to_markdown()


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        (["model.layers.0.q.weight", "model.layers.1.q.weight", "lm_head.weight"], "model.layers."),
        (["a.b.weight", "a.b.bias"], ""),  # too short to be worth it
        (["transformer.h.0.q", "transformer.h.1.q", "transformer.wte.weight", "transformer.wpe"], "transformer.h."),
        (["long_name_of_a_module"] * 3, ""),  # nothing would be left
        ([], ""),
    ],
)
def test_what_most_names_begin_with_is_folded(names, prefix):
    assert folded(names) == prefix


def test_page_and_markdown_say_the_same_facts_by_value(small, swan):
    expected = {
        "learning rate (peak)": "0.1",
        "weight decay": "0",
        "tensors": "2 measured, 1 given, 1 fallback, 2 pending",
        "learning rate of a tensor": "0.05 to 0.8485",
        "scale": "1 to 8.485",
        "g-SNR / sqrt(numel)": "1 to 1.5",
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
    [
        (
            [0.5, 1.0],
            "the run&#39;s learning rate x scale. A range is from the lowest to the highest of the schedule.</li>",
        ),
        ([], "at the peak: the run&#39;s learning rate x scale.</li>"),
    ],
)
def test_a_note_on_learning_rates_stands_where_there_are_scales(small, swan, schedule, note):
    assert note in dataclasses.replace(small, schedule=schedule).to_html()
    assert "learning rate: what" not in dataclasses.replace(swan, schedule=schedule).to_html()


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


def test_theorys_line_is_at_the_ratio_of_a_gradient_of_zero_mean(small):
    """A tensor of 9 elements whose g-SNR is sqrt(8) is on the line; one element has none, and its fallback is 1."""
    assert [theory(numel) for numel in (0, 1, 2, 9)] == pytest.approx([1.0, 1.0, math.sqrt(0.5), math.sqrt(8) / 3])
    rows = [tensor_row("norm.weight", None, (9,), math.sqrt(8) / 3), tensor_row("layers.0.q.weight", 0, (4, 4), 1.1)]
    page = Page(report_of(rows).to_html())
    mark = page.all("circle", **{"class": "measured"})[0]
    places = page.all("path", id="theory")[0]["d"].split("M")[1:]
    assert len(places) == 2
    assert f" {mark['cy']}h" in places[0]
    assert "sqrt((n - 1) / n): zero mean" in report_of(rows).to_html()
    assert "The dark line" not in small.to_html()


def test_history_is_one_line_with_its_marks(small):
    page = Page(small.to_html())
    assert len(page.all("polyline")) == 1
    marks = [each for each in page.all("circle") if not each.get("class")]
    assert [float(each["cx"]) for each in marks] == [80.0, pytest.approx(293.3, abs=0.1), 720.0]
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
    for sentence in ("is whitened as it is, without state", "updated by Adam, with two moments", "that are trained."):
        assert sentence in swan.to_html()  # what the columns mean
    widths = [each["style"] for each in page.all("i") if each.get("class", "").startswith("bar")]
    assert widths[:2] == ["width: 37.50%", "width: 75.00%"]  # state against AdamW's: a half


def test_a_report_of_nothing_is_a_page():
    assert Page(report_of([]).to_html()).tables["tensors"][1:] == []


def test_what_is_too_much_for_a_page_is_said(monkeypatch):
    monkeypatch.setattr("hf_sai.report.html.MAX_ROWS", 100)
    rows = [tensor_row(f"layers.0.expert{i}.weight", 0, (4, 4), 1.0) for i in range(1001)]
    text = report_of(rows).to_html()
    assert len(Page(text).tables["tensors"]) == 101  # with the head
    assert 'const prefix = "", most = 100;' in text
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
    downwards = [*upwards[::-1], "layers.7.kind_3.weight"]  # what is pending is last in both directions
    assert names == [name for name in downwards if "kind_3." in name]
    assert page.all("body")[0]["data-ascending"].split() == [*upwards, "layers.7.kind_3.weight"]
    assert [each.get("aria-sort") for each in page.all("th", scope="col")][:5] == [
        None,
        None,
        None,
        "descending",
        None,
    ]
    assert "100 of 2000" in page.shown
    assert len(page.all("circle", **{"class": "measured"})) == 1999
    assert len([each for each in page.all("rect") if each.get("class") == "settled"]) == 1999
    assert len([each for each in page.all("rect") if each.get("class") == "pending"]) == 1
    assert "hidden" not in page.all("div", id="tip")[0]
    assert page.all("circle")[0]["data-tip"].startswith(
        f"layers.0.kind_0.weight: learning rate {rows[0].learning_rate:.3g}, scale {rows[0].scale:.4g}, "
    )


@pytest.mark.slow
@needs_browser
def test_of_12000_tensors_those_that_are_looked_for_are_shown(tmp_path):
    rows = [
        tensor_row(
            f"model.layers.{layer}.mlp.experts.{expert}.up.weight", layer, (4, 4), 1.0 + (60 * expert + layer) / 1e4
        )
        for layer in range(60)
        for expert in range(200)
    ]
    click = """<script>
    const button = [...document.querySelectorAll("th button")].find(each => each.textContent === "scale");
    document.body.dataset.first = body.rows.length;
    button.click();
    button.click();
    document.body.dataset.largest = body.rows[0].cells[0].textContent;
    const box = document.getElementById("filter");
    box.value = "MODEL.layers.59.mlp.experts.7";
    box.dispatchEvent(new Event("input"));
    </script></body>"""
    page = Page(browse(tmp_path, report_of(rows).to_html().replace("</body>", click), "--dump-dom"))
    looked_at = page.all("body")[0]
    assert (looked_at["data-first"], looked_at["data-largest"]) == ("2000", "…\u206059.mlp.experts.199.up.weight")
    names = [row[0].removeprefix("…\u2060") for row in page.tables["tensors"][1:]]
    assert names == [f"59.mlp.experts.{expert}.up.weight" for expert in [*range(79, 69, -1), 7]]
    assert page.tables["tensors"][-1][3] == f"{4 * (1.0 + (60 * 7 + 59) / 1e4):.4g}"


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
