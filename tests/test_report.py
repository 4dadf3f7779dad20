"""The report as data: kinds, numbers, files, and what it refuses to read."""

from __future__ import annotations

import dataclasses
import io
import json
import math

import pytest
import torch
from support.models import tiny_llama

from hf_sai import SWAN, GSNRReport, SGDSaI, param_groups
from hf_sai.optim import get_record, list_records, optimizer_state_bytes, registry
from hf_sai.report import ReportError
from hf_sai.report.rows import split_name


@pytest.fixture
def report():
    """Two blocks with a matrix each, a scalar (fallback) and a tensor without gradient (pending)."""
    torch.manual_seed(0)
    shapes = {"layers.0.q.weight": (4, 6), "layers.1.q.weight": (4, 6), "logit_scale": (), "late.weight": (3,)}
    pairs = [(name, torch.nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]
    optimizer = SGDSaI(pairs, lr=0.2, normalize="max")
    for name, param in pairs:
        param.grad = torch.zeros(3) if name.startswith("late") else torch.randn(param.shape)
    optimizer.step()
    return GSNRReport.from_optimizer(optimizer, {"world_size": 1})


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight", "self_attn.q_proj.lora_A", 3),
        ("base_model.model.model.layers.3.mlp.up_proj.lora_B.second.weight", "mlp.up_proj.lora_B.second", 3),
        ("model.embed_tokens.weight", "embed_tokens", None),
        ("module.model.norm.weight", "norm", None),
        ("transformer.h.11.ln_1.bias", "ln_1.bias", 11),
        ("base_model.model.lm_head.lora_A.default.weight", "lm_head.lora_A", None),
        ("model.layers.0.mlp.experts.7.w1.weight", "mlp.experts.7.w1", 0),
        ("0.weight", "0", None),
        ("logit_scale", "logit_scale", None),
    ],
)
def test_kind_and_layer_of_a_name(name, kind, layer):
    assert split_name(name) == (kind, layer)


def test_rows_hold_what_the_optimizer_did(report):
    rows = {row.name: row for row in report.tensors}
    first, second = rows["layers.0.q.weight"], rows["layers.1.q.weight"]
    assert max(first.scale, second.scale) == 1.0
    assert first.gsnr_over_sqrt_numel == pytest.approx(first.gsnr / math.sqrt(24))
    assert first.learning_rate == pytest.approx(0.2 * first.scale)
    assert (rows["logit_scale"].status, rows["logit_scale"].gsnr) == ("fallback", 1.0)
    assert (rows["late.weight"].status, rows["late.weight"].step, rows["late.weight"].scale) == ("pending", 0, 0.0)
    assert report.summary()["measured"] == 2
    assert report.summary()["scale_max"] == 1.0
    assert [(e["kind"], e["tensors"], e["steps"]) for e in report.by_kind()] == [
        ("q", 2, [1]),
        ("logit_scale", 1, [1]),
        ("late", 1, []),
    ]


def test_state_bytes_are_half_of_adamws(report):
    elements = 24 + 24 + 1 + 3
    assert (report.state_bytes, report.adamw_state_bytes) == (4 * elements, 8 * elements)


def test_state_bytes_of_any_optimizer():
    param = torch.nn.Parameter(torch.ones(10))
    optimizer = torch.optim.Adam([param])
    param.grad = torch.ones(10)
    optimizer.step()
    assert optimizer_state_bytes(optimizer) == 2 * 40 + 4  # and the step counter


def test_json_round_trip_is_exact(report, tmp_path):
    path = report.save(tmp_path)
    assert GSNRReport.load(path) == GSNRReport.load(tmp_path) == report
    assert json.loads(path.read_text())["schema"] == 3
    assert sorted(file.name for file in tmp_path.iterdir()) == ["gsnr_report.json", "gsnr_report.png"]


def test_saving_without_a_picture(report, tmp_path):
    report.save(tmp_path / "new" / "folder", picture=False)
    assert [file.name for file in (tmp_path / "new" / "folder").iterdir()] == ["gsnr_report.json"]


def test_a_picture_of_an_earlier_runs_history_does_not_stay(report, tmp_path):
    gsnr = {row.name: row.gsnr for row in report.by_status("measured")}
    dataclasses.replace(report, history=[{"step": 2, "gsnr": gsnr}]).save(tmp_path)
    assert (tmp_path / "gsnr_history.png").is_file()
    report.save(tmp_path, picture=False)
    assert not (tmp_path / "gsnr_history.png").exists()


def test_saving_where_matplotlib_is_missing(report, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_sai.report.report.importlib.util.find_spec", lambda name: None)
    report.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["gsnr_report.json"]


def change(content, path, value):
    *parents, last = path
    for key in parents:
        content = content[key]
    if value is KeyError:
        del content[last]
    else:
        content[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["schema"], 4, "schema must be 1 or 2 or 3 but is 4"),
        (["schema"], KeyError, "schema must be 1 or 2 or 3 but is None"),
        (["schema"], True, "schema must be 1 or 2 or 3 but is True"),
        (["tensors"], None, "tensors of a g-SNR report must be a list"),
        (["tensors"], KeyError, "tensors of a g-SNR report must be a list"),
        (["tensors", 0], "x", r"tensors\[0\] of a g-SNR report must be a dict"),
        (["tensors", 1, "gsnr"], "1.0", r"tensors\[1\].gsnr of a g-SNR report must be a number from 0 .* is '1.0'"),
        (["tensors", 1, "scale"], 0.0, r"tensors\[1\].scale of a g-SNR report must be above 0 where .* is measured"),
        (["tensors", 1, "numel"], True, r"tensors\[1\].numel of a g-SNR report must be a whole number from 0"),
        (
            ["tensors", 1, "numel"],
            23,
            r"tensors\[1\].numel of a g-SNR report must be the product of the shape",
        ),
        (["tensors", 0, "shape"], [1.5], r"tensors\[0\].shape of a g-SNR report must be a list of at most 64 whole"),
        (["tensors", 0, "status"], "new", r"tensors\[0\].status of a g-SNR report must be one of measured, given"),
        (["tensors", 0, "step"], KeyError, r"tensors\[0\] of a g-SNR report must .* but has missing: \['step'\]"),
        (["options"], [], "options of a g-SNR report must be a dict"),
        (["run"], {"a": [{"b": float("nan")}]}, "run.a of a g-SNR report must be a finite number but is nan"),
        (["extra"], 1, r"the top of a g-SNR report must have its own fields but has unknown: \['extra'\]"),
    ],
)
def test_a_damaged_file_names_the_field(report, path, value, message):
    content = json.loads(report.to_json())
    change(content, path, value)
    with pytest.raises(ReportError, match=message):
        GSNRReport.from_json(json.dumps(content))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', '{"schema": 1'])
def test_what_is_no_report(text):
    with pytest.raises(ReportError):
        GSNRReport.from_json(text)


def test_other_optimizers_have_no_report():
    with pytest.raises(TypeError, match="needs an optimizer of hf_sai but got SGD"):
        GSNRReport.from_optimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]))


def test_markdown_is_a_table_by_kind_and_by_layer(report):
    lines = dataclasses.replace(report, schedule=[0.5, 1.0]).to_markdown().splitlines()
    first, second = report.tensors[:2]
    head = (
        "| tensors | shape | update / weight | update (RMS) | learning rate | over the schedule | scale "
        "| g-SNR / sqrt(numel) | step | status |"
    )
    place = lines.index(f"| kind {head}")
    low, high = sorted((first.learning_rate, second.learning_rate))
    middle = max((first, second), key=lambda row: row.scale)
    update = max(row.learning_rate * row.gradient_norm for row in (first, second)) / math.sqrt(24)  # weights are 1
    cells = f"{update:.3g} | {update:.3g} | {high:.3g} | {low / 2:.3g} to {high:.3g} | "
    cells += f"{middle.scale:.4g} | {middle.gsnr_over_sqrt_numel:.3f} | 1 | measured |"
    assert lines[place + 2] == f"| q | 2 | 4x6 | {cells}"
    assert lines[place + 4] == "| late | 1 | 3 |  |  |  |  |  |  |  | pending |"
    place = lines.index(f"| layer {head}")
    assert [line.split(" | ")[0] for line in lines[place + 2 : place + 5]] == ["| none", "| 0", "| 1"]
    assert "| optimizer state | 208 bytes (AdamW: 416 bytes) |" in lines


def test_markdown_keeps_a_name_that_is_markup(report):
    row = dataclasses.replace(report.tensors[0], kind="a|b<script>`x`*y*")
    lines = dataclasses.replace(report, tensors=[row]).to_markdown().splitlines()
    assert any(line.startswith(r"| a\|b\<script\>\`x\`\*y\* | 1 |") for line in lines)


def test_text_shows_where_a_gradients_mean_stands_out(report):
    rows = [
        dataclasses.replace(report.tensors[0], name=f"layers.{i}.q.weight", gsnr_over_sqrt_numel=1.0 + i / 100)
        for i in range(30)
    ]
    lines = dataclasses.replace(report, tensors=rows).to_text().splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("largest g-SNR / sqrt(n)"))
    assert [line.split()[0] for line in lines[place + 1 :]] == [f"layers.{i}.q.weight" for i in (29, 28, 27, 26, 25)]


def test_a_name_that_is_markup_or_moves_the_cursor_stays_text(report):
    row = dataclasses.replace(report.tensors[0], kind="[red]q[/red]\x1b[2J")
    assert "[red]q[/red]?[2J " in dataclasses.replace(report, tensors=[row]).to_text()


def test_no_text_of_a_report_moves_the_cursor(report, swan_report):
    odd = "a\x1b[2Jb"
    route = dataclasses.replace(swan_report.routes[0], route=odd, reason=odd)
    other = dataclasses.replace(report, options={"normalize": odd})
    named = dataclasses.replace(report, optimizer=odd, options={odd: odd})
    texts = [named.to_text(), dataclasses.replace(swan_report, routes=[route]).to_text(), report.diff(other).to_text()]
    assert [text.count("a?[2Jb") for text in texts] == [3, 2, 1]
    assert "\x1b" not in "".join(texts)


def test_text_fits_a_terminal(report):
    lines = report.to_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("q ") and " 4x6 " in line for line in lines)


def drawn(report):
    """The figure behind the PNG: its texts and the patches of the left panel."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    from hf_sai.report import plots

    figures = []
    original = Figure.savefig

    def keep(self, *args, **kwargs):
        figures.append(self)
        return original(self, *args, **kwargs)

    Figure.savefig = keep
    try:
        png = plots.report_png(report)
    finally:
        Figure.savefig = original
    left, middle, right = figures[0].axes[:3]
    cells = [patch for patch in left.patches if isinstance(patch, Rectangle)]
    return png, figures[0], left, middle, right, cells


def test_picture_marks_pending_and_fallback_and_names_the_kinds(report):
    png, figure, left, middle, right, cells = drawn(report)
    assert png[:4] == b"\x89PNG"
    assert len(cells) == 4
    assert [label.get_text() for label in left.get_yticklabels()] == ["q", "logit_scale", "late"]
    assert sum(bool(cell.get_hatch()) for cell in cells) == 1
    assert sum(cell.get_linewidth() == 2 for cell in cells) == 1
    assert "pending" in [text.get_text() for text in left.texts]
    moved = [f"{row.moved:.2g}" for row in report.tensors[:3]]
    assert [text.get_text() for text in left.texts] == [*moved, "pending"]
    legend = [text.get_text() for text in right.get_legend().get_texts()]
    assert legend == [
        "measured: 2",
        "fallback, no deviation: 1",
        "pending, no gradient yet: 1",
        "sqrt(n - 1): a gradient of zero mean",
    ]
    assert figure.get_suptitle().startswith(
        "sgd_sai\n4 tensors: 2 measured, 1 fallback, 1 pending  |  learning rate 0.2"
    )
    first, second, scalar = report.tensors[:3]
    points = [
        [tuple(point) for each in axes.collections for point in each.get_offsets().tolist()]
        for axes in (middle, right)
    ]
    assert points[0] == [
        pytest.approx(point)
        for point in ((first.learning_rate, 0), (second.learning_rate, 0), (scalar.learning_rate, 1))
    ]
    expected = [(math.sqrt(24), first.scale), (math.sqrt(24), second.scale), (1.0, scalar.scale)]
    assert points[1][:3] == [pytest.approx(point) for point in expected]
    (line,) = right.lines
    largest = max(first.gsnr, second.gsnr)  # it divides the scales
    expected = [(math.sqrt(3), math.sqrt(2) / largest), (math.sqrt(24), math.sqrt(23) / largest)]
    assert [tuple(point) for point in line.get_xydata().tolist()] == [pytest.approx(point) for point in expected]


def test_picture_of_nothing_measured_yet():
    optimizer = SGDSaI([("w", torch.nn.Parameter(torch.ones(3)))])
    png, figure, *_, cells = drawn(GSNRReport.from_optimizer(optimizer))
    assert png[:4] == b"\x89PNG"
    assert "1 pending" in figure.get_suptitle()
    assert [bool(cell.get_hatch()) for cell in cells] == [True]


def test_names_fonts_and_a_foreign_matplotlibrc_do_not_cost_the_picture(report):
    """The picture is the same whatever a matplotlibrc says; a name of 300 letters leaves it its size."""
    import matplotlib
    from matplotlib.image import imread

    from hf_sai.report.plots import diff_png, history_png, report_png

    odd = ["x" * 300, "$a_{b$", "图层.重み", r"\frac{1}{2}"]
    rows = [dataclasses.replace(report.tensors[0], kind=kind, name=f"{kind}.weight") for kind in odd]
    history = [{"step": step, "gsnr": {row.name: row.gsnr * step for row in rows}} for step in (1, 2)]
    named = dataclasses.replace(report, tensors=rows, history=history, run={"model": "图" * 300})
    draw = [lambda: report_png(named), lambda: history_png(named), lambda: diff_png(named.diff(named))]
    plain = [each() for each in draw]
    foreign = {
        "text.usetex": True,
        "font.family": "No Such Font",
        "savefig.dpi": 17,
        "savefig.format": "pdf",
        "axes.facecolor": "black",
        "figure.autolayout": True,
    }
    with matplotlib.rc_context(foreign):
        assert [each() for each in draw] == plain
        assert matplotlib.rcParams["savefig.dpi"] == 17
    (height, width, _) = imread(io.BytesIO(plain[0])).shape
    assert (width, height) == (1500, 480)
    labels = [label.get_text() for label in named.plot().axes[0].get_yticklabels()]
    assert labels == ["..." + "x" * 37, *odd[1:]]


def test_the_map_shows_the_share_of_the_weights_or_the_update_or_the_scale(report):
    """The update where a matrix starts at zero, as LoRA's B do; the scale where an older report knows no norm."""
    first = report.tensors[0]
    vector = dataclasses.replace(report.tensors[3], status="measured", gsnr=1.7, scale=0.4, gradient_norm=1.0)
    for changed, title in (
        ([first, dataclasses.replace(vector, weight_rms=0.0)], "RMS of update / weight"),
        ([first, dataclasses.replace(first, weight_rms=0.0)], "RMS of update"),
        ([dataclasses.replace(first, gradient_norm=0.0)], "scale"),
    ):
        axes = dataclasses.replace(report, tensors=changed).plot().axes[0]
        assert axes.get_title(loc="left").endswith(title)


# ---- SWAN ----


@pytest.fixture
def swan_report():
    model = tiny_llama()
    optimizer = SWAN(param_groups(model, "swan", weight_decay=0.1), lr=0.002)
    model(input_ids=torch.arange(12).view(1, 12), labels=torch.arange(12).view(1, 12)).loss.backward()
    optimizer.step()
    return GSNRReport.from_optimizer(optimizer, {"seed": 1})


def test_swans_report_holds_every_route_with_its_reason(swan_report):
    assert swan_report.optimizer == "swan"
    assert swan_report.tensors == []
    rows = {row.name: row for row in swan_report.routes}
    assert len(rows) == 21
    row = rows["model.layers.1.mlp.up_proj.weight"]
    assert (row.kind, row.layer, row.shape, row.route, row.reason) == (
        "mlp.up_proj", 1, (24, 16), "matrix", "linear layer"
    )  # fmt: skip
    assert (rows["lm_head.weight"].route, rows["lm_head.weight"].reason) == ("adam", "output head")
    adams = sum(row.numel for row in rows.values() if row.route == "adam")
    assert swan_report.state_bytes == 8 * adams + 4 * 7  # two moments, and seven steps
    assert swan_report.adamw_state_bytes == 8 * sum(row.numel for row in rows.values())
    assert swan_report.options["betas"] == [0.9, 0.999]
    assert swan_report.summary()["whitened"] == 14.0


def test_swans_report_survives_as_json_with_its_picture(swan_report, tmp_path):
    assert GSNRReport.load(swan_report.save(tmp_path)) == swan_report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gsnr_report.json", "gsnr_report.png"]
    broken = swan_report.to_json().replace('"route": "matrix"', '"route": 5', 1)
    with pytest.raises(ReportError, match=r"routes\[\d+\]\.route of a g-SNR report must be text but is 5"):
        GSNRReport.from_json(broken)


def test_swans_picture_has_a_bar_for_the_elements_of_each_kind(swan_report):
    axes = swan_report.plot().axes[0]
    entries = sorted(swan_report.by_route(), key=lambda entry: -entry["numel"])
    total = sum(row.numel for row in swan_report.routes)
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([100 * e["numel"] / total for e in entries])
    assert [label.get_text() for label in axes.get_yticklabels()] == [entry["kind"] for entry in entries]
    blue = axes.patches[0].get_facecolor()
    assert [bar.get_facecolor() == blue for bar in axes.patches] == [entry["route"] != "adam" for entry in entries]
    assert "79.8% of 5,456 elements whitened" in swan_report.plot().get_suptitle()


def test_swans_text_fits_a_terminal(swan_report):
    lines = swan_report.to_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("self_attn.q_proj") and line.endswith("matrix: linear layer") for line in lines)
    assert "21 tensors: 14 whitened" in "\n".join(lines)


# ---- an optimizer that has neither scales nor routes ----


class Plain(torch.optim.SGD):
    """A third optimizer: torch's own, with a record."""


@pytest.fixture
def plain_record(monkeypatch):
    record = dataclasses.replace(get_record("sgd_sai"), name="plain", cls=Plain, rows="groups")
    monkeypatch.setitem(registry._RECORDS, "plain", record)
    return record


@pytest.fixture
def plain_report(plain_record):
    layers = [(f"layers.{layer}.q.weight", torch.nn.Parameter(torch.ones(4, 6))) for layer in range(2)]
    groups = [
        {"params": layers, "weight_decay": 0.1},
        {"params": [("norm.weight", torch.nn.Parameter(torch.ones(3)))], "lr": 0.5},
    ]
    optimizer = Plain(groups, lr=0.2, momentum=0.9)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()
    return GSNRReport.from_optimizer(optimizer, {"seed": 1})


def test_a_third_optimizers_rows_are_its_groups(plain_report):
    rows = [(row.name, row.kind, row.layer, row.numel, row.route) for row in plain_report.routes]
    assert rows == [
        ("layers.0.q.weight", "q", 0, 24, "group 0"),
        ("layers.1.q.weight", "q", 1, 24, "group 0"),
        ("norm.weight", "norm", None, 3, "group 1"),
    ]
    first, _, last = [dict(each.split("=") for each in row.reason.split(", ")) for row in plain_report.routes]
    assert (first["lr"], first["weight_decay"], first["momentum"]) == ("0.2", "0.1", "0.9")
    assert (last["lr"], last["weight_decay"]) == ("0.5", "0")
    assert (plain_report.kind, plain_report.log_prefix) == ("groups", "plain")
    assert plain_report.summary() == {"tensors": 3.0, "groups": 2.0, "state_bytes": 4.0 * 51}
    assert plain_report.learning_rate == 0.5


def test_a_third_optimizers_report_is_whole_in_every_medium(plain_report, tmp_path):
    assert GSNRReport.load(plain_report.save(tmp_path)) == plain_report
    text, markdown, page = plain_report.to_text(), plain_report.to_markdown(), plain_report.to_html()
    assert "3 tensors: 3 in 2 groups" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "| tensors | 3 in 2 groups |" in markdown.splitlines()
    assert any(
        line.startswith("| q | 2 | 4x6 | group 0: lr=0.2, weight_decay=0.1, ") for line in markdown.splitlines()
    )
    assert "Group by module and depth" in page
    assert "<h2>Groups</h2>" in page
    figure = plain_report.plot()
    assert figure.get_suptitle() == "plain\n3 in 2 groups  |  state 204 bytes, AdamW's 408 bytes"
    assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx([100 * 48 / 51, 100 * 3 / 51])
    for shown in (text, markdown, page, figure.get_suptitle()):
        assert not any(word in shown for word in ("SWAN", "SGD-SaI", "whitened (", "Adam,", "to Adam"))
    with pytest.raises(ReportError, match="but the first is of plain, which has none"):
        plain_report.diff(plain_report)


def test_a_report_of_an_optimizer_that_is_not_known_here_can_be_shown(plain_report, monkeypatch):
    """Another's record made it; of what is there, the rows say what they can be read as."""
    expected = plain_report.to_text(), plain_report.to_markdown(), plain_report.to_html()
    monkeypatch.delitem(registry._RECORDS, "plain")
    read = GSNRReport.from_json(plain_report.to_json())
    assert (read.to_text(), read.to_markdown(), read.to_html()) == expected


def test_the_rows_of_known_optimizers_are_what_their_records_say(report, swan_report):
    assert [report.kind, swan_report.kind] == ["scales", "routes"]
    assert [report.log_prefix, swan_report.log_prefix] == ["gsnr", "swan"]
    assert dataclasses.replace(swan_report, optimizer="swan_layerwise").log_prefix == "swan"
    assert {record.name: record.rows for record in list_records()} == {
        "sgd_sai": "scales", "sgd_sai_layerwise": "scales", "swan": "routes", "swan_layerwise": "routes"
    }  # fmt: skip
