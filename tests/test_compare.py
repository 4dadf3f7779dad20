"""Two runs' scales, tensor by tensor: data, text, picture, and the command with its exit codes."""

from __future__ import annotations

import dataclasses
import json

import pytest
from support.reports import report_of, tensor_row
from typer.testing import CliRunner

from hf_sai import GSNRReport
from hf_sai.cli import app
from hf_sai.report import ReportError, RouteRow


def scaled(row, factor):
    return dataclasses.replace(row, gsnr=row.gsnr * factor, scale=row.scale * factor)


ROWS = [tensor_row(f"layers.{layer}.q.weight", layer, (4, 4), 1.0) for layer in range(4)]
GONE, LATE = tensor_row("gone.weight", None, (4,), 1.0), tensor_row("late.weight", None, (4,), 1.0)
NEVER = tensor_row("never.weight", None, (4,), 0.0, "pending")
NEW, RESHAPED = tensor_row("new.weight", None, (4,), 1.0), tensor_row("wide.weight", None, (4, 9), 1.0)
PENDING = tensor_row("late.weight", None, (4,), 0.0, "pending")


@pytest.fixture
def runs():
    """The second has other scales in three layers; a tensor each is gone, new, pending, pending in both, reshaped."""
    first = report_of([*ROWS, GONE, LATE, NEVER, tensor_row("wide.weight", None, (6, 6), 1.0)])
    changed = [ROWS[0], scaled(ROWS[1], 1.5), scaled(ROWS[2], 1.1), scaled(ROWS[3], 0.5)]
    return first, report_of([*changed, PENDING, NEVER, RESHAPED, NEW])


def test_rows_hold_ratios_and_what_one_run_lacks(runs):
    diff = runs[0].diff(runs[1])
    assert [(row.name, row.ratio, row.missing, row.reshaped) for row in diff.rows] == [
        ("layers.0.q.weight", 1.0, "", False),
        ("layers.1.q.weight", 1.5, "", False),
        ("layers.2.q.weight", pytest.approx(1.1), "", False),
        ("layers.3.q.weight", 0.5, "", False),
        ("gone.weight", None, "not in second", False),
        ("late.weight", None, "pending in second", False),
        ("never.weight", None, "", False),
        ("wide.weight", 1.0, "", True),
        ("new.weight", None, "not in first", False),
    ]
    assert (diff.quantity, diff.notes) == ("scale", [])


@pytest.mark.parametrize(
    ("ratio", "apart"), [(2.0, []), (1.99, ["layers.3.q"]), (1.2, ["layers.1.q", "layers.3.q"]), (1.0, None)]
)
def test_apart_is_a_factor_up_or_down_or_what_one_run_lacks(runs, ratio, apart):
    names = [row.name.removesuffix(".weight") for row in runs[0].diff(runs[1]).apart(ratio)]
    expected = ["layers.1.q", "layers.2.q", "layers.3.q"] if apart is None else apart
    assert names == [*expected, "gone", "late", "wide", "new"]


def test_equal_runs_are_nowhere_apart(runs):
    assert runs[0].diff(runs[0]).apart(1.0) == []


@pytest.mark.parametrize("ratio", [0.9, 0.0, -1.0, float("inf"), float("nan")])
def test_a_ratio_below_1_is_refused(runs, ratio):
    with pytest.raises(ValueError, match="must be a finite number from 1 but is"):
        runs[0].diff(runs[1]).apart(ratio)


def test_runs_that_normalise_differently_are_compared_by_gsnr():
    first = report_of(ROWS)
    rows = [dataclasses.replace(row, gsnr=2.0 * row.gsnr, scale=0.25) for row in ROWS]
    second = report_of(rows, run={"effective_batch_size": 8})
    second = dataclasses.replace(second, options={"normalize": "max"}, gsnr_max=32.0, learning_rate=3.2)
    diff = dataclasses.replace(first, run={"effective_batch_size": 4}).diff(second)
    assert (diff.quantity, {row.ratio for row in diff.rows}) == ("g-SNR", {2.0})
    assert diff.notes == [
        "The runs normalise differently (first none, second max): max divides by the largest g-SNR (32). g-SNR is "
        "compared here, and the learning rate of the one is not one for the other.",
        "The peak learning rate is 0.1 in the first run and 3.2 in the second.",
        "The batch that was measured is 4 in the first run and 8 in the second.",
    ]
    assert diff.rows[0].values("g-SNR") == (4.0, 8.0)
    assert max(map(len, diff.to_text().splitlines())) <= 80


def test_what_rms_divides_by_is_read_from_the_rows():
    rows = [dataclasses.replace(row, scale=row.gsnr / 0.125) for row in ROWS]
    first = dataclasses.replace(report_of(rows), options={"normalize": "rms"})
    second = dataclasses.replace(report_of(ROWS), options={"normalize": "max"}, gsnr_max=32.0)
    assert (first.normalizer, second.normalizer, report_of(ROWS).normalizer) == (0.125, 32.0, 1.0)
    assert (
        first.diff(second)
        .notes[0]
        .startswith(
            "The runs normalise differently (first rms, second max): max divides by the largest g-SNR (32) and "
            "rms divides by the RMS of the first gradient times its scales (0.125). g-SNR is compared here"
        )
    )


def test_a_run_of_swan_has_nothing_to_compare(runs):
    routes = [RouteRow("q.weight", "q", None, (2, 2), 4, "matrix", "linear layer")]
    swan = dataclasses.replace(runs[0], optimizer="swan", tensors=[], routes=routes)
    for first, second, which in ((swan, runs[1], "first"), (runs[0], swan, "second")):
        with pytest.raises(ReportError, match=f"but the {which} is of swan, which has none"):
            first.diff(second)


def test_the_scatter_plot_has_a_point_per_tensor_of_both_and_marks_what_is_apart(runs):
    axes = runs[0].diff(runs[1]).plot(1.2).axes[0]
    near, apart = axes.collections[:2]
    assert near.get_offsets().tolist() == [[4.0, 4.0], [4.0, pytest.approx(4.4)]]
    assert apart.get_offsets().tolist() == [[4.0, 6.0], [4.0, 2.0], [6.0, 6.0]]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[:2] == ["tensors of both: 2", "further apart than 1.2, or of another shape: 3"]
    assert report_of([]).diff(report_of([])).plot() is not None


def test_what_was_chosen_differently_is_noted(runs):
    """Pairs with what that means; an option that an older report does not have counts as the default that it was."""
    first, second = (
        dataclasses.replace(runs[0], options={"normalize": normalize, "momentum": 0.9, "lora_policy": policy})
        for normalize, policy in (("none", "plain"), ("rms", "paired"))
    )
    notes = first.diff(second).notes
    assert notes[0].endswith(
        "(first none, second rms): rms divides by the RMS of the first gradient times its scales (1). g-SNR is "
        "compared here, and the learning rate of the one is not one for the other."
    )
    paired = (
        "lora_policy is plain in the first run and paired in the second: pairs are trained on bounded gradients, so "
        "that equal scales are no equal steps, and the learning rate of the one is not one for the other."
    )
    assert notes[1:] == [paired]
    older = dataclasses.replace(second, options={"normalize": "rms", "momentum": 0.8})
    assert older.diff(second).notes == [
        "momentum is 0.8 in the first run and 0.9 in the second.",
        paired,
    ]
    assert older.diff(dataclasses.replace(older, options={**older.options, "lora_policy": "plain"})).notes == []


# ---- the command ----


@pytest.fixture
def files(runs, tmp_path):
    for name, report in zip(("a", "b"), runs, strict=True):
        report.save(tmp_path / name, picture=False)
    return str(tmp_path / "a"), str(tmp_path / "b")


def compare(*arguments):
    return CliRunner().invoke(app, ["compare", *arguments])


def test_the_command_prints_what_is_missing_and_what_is_furthest_apart(files):
    result = compare(*files)
    assert (result.exit_code, result.stderr) == (0, "")
    assert [" ".join(line.split()) for line in result.stdout.splitlines()] == [
        "5 tensors in both runs; scale second / first 0.5 to 1.5; 3 missing or pending in",
        "one; 1 of another shape",
        "",
        "missing or pending in one run",
        "gone.weight not in second",
        "late.weight pending in second",
        "wide.weight 6x6 -> 4x9",
        "new.weight not in first",
        "",
        "scale, furthest apart first first second ratio",
        "layers.3.q.weight 4 2 0.5",
        "layers.1.q.weight 4 6 1.5",
        "layers.2.q.weight 4 4.4 1.1",
        "layers.0.q.weight 4 4 1",
        "wide.weight 6 6 1",
    ]
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_the_command_writes_json_and_a_picture(files, runs, tmp_path):
    picture = tmp_path / "scatter.png"
    result = compare(*files, "--json", "--plot", str(picture), "--fail-over", "1.2")
    assert result.exit_code == 1
    content = json.loads(result.stdout)
    failed = ["layers.1.q.weight", "layers.3.q.weight", "gone.weight", "late.weight", "wide.weight", "new.weight"]
    assert (content["fail_over"], content["failed"]) == (1.2, failed)
    diff = runs[0].diff(runs[1])
    assert {key: content[key] for key in ("quantity", "notes")} == {"quantity": "scale", "notes": []}
    assert content["tensors"] == json.loads(json.dumps(diff.to_dict()["tensors"]))
    assert content["tensors"][1]["first"]["scale"] == 4.0
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("same", "ratio", "code", "message"),
    [
        (True, "1", 0, ""),
        (False, "2", 1, "hf-sai: 4 of 9 tensors fail --fail-over 2\n"),
        (False, "0.5", 2, "hf-sai: the ratio of a comparison must be a finite number from 1 but is 0.5; try 1.1\n"),
        (False, "nan", 2, "hf-sai: the ratio of a comparison must be a finite number from 1 but is nan; try 1.1\n"),
    ],
)
def test_exit_codes(files, same, ratio, code, message):
    result = compare(files[0], files[0] if same else files[1], "--fail-over", ratio)
    assert (result.exit_code, result.stderr) == (code, message)


def test_what_cannot_be_compared_is_2_and_one_sentence(files, tmp_path):
    (tmp_path / "broken.json").write_text("{")
    for other in (tmp_path / "broken.json", tmp_path):
        result = compare(files[0], str(other), "--fail-over", "2")
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert result.stderr.startswith(f"hf-sai: the second run {other}: a g-SNR report must be ")
    assert compare(files[0]).exit_code == 2


def test_a_repository_is_read_of_each_side_with_its_revision(files, monkeypatch):
    asked = []
    real = GSNRReport.from_pretrained

    def from_pretrained(source, revision=None):
        asked.append((source, revision))
        return real({"user/a": files[0], "user/b": files[1]}[source])

    monkeypatch.setattr(GSNRReport, "from_pretrained", from_pretrained)
    assert compare("user/a", "user/b", "--revision", "v1", "--other-revision", "v2").exit_code == 0
    assert asked == [("user/a", "v1"), ("user/b", "v2")]
