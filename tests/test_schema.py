"""Damaged report files: each is one clear error that names the field, in bounded memory."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import tracemalloc

import pytest
import torch
from support.models import tiny_llama

from hf_sai import SWAN, GSNRReport, SGDSaI, param_groups
from hf_sai.report import ReportError, schema, thinned
from hf_sai.report.rows import TensorRow


NEW_IN_3 = ("factor", "gradient_norm", "weight_rms")
ROW_FIELDS = {
    **dict.fromkeys(("name", "kind", "status", "route", "reason"), "text"),
    **dict.fromkeys((*NEW_IN_3, "gsnr", "gsnr_over_sqrt_numel", "scale", "learning_rate"), "number"),
    **dict.fromkeys(("layer", "numel", "step"), "whole"),
    "shape": "list",
}
TOP_FIELDS = {
    **dict.fromkeys(("learning_rate", "weight_decay", "gsnr_max"), "number"),
    **dict.fromkeys(("state_bytes", "adamw_state_bytes"), "whole"),
    **dict.fromkeys(("tensors", "routes", "history", "schedule"), "list"),
    **dict.fromkeys(("options", "run", "versions"), "dict"),
    "optimizer": "text",
}
NONE_OF = {  # what is never right in a field of that type
    "text": (5, None, True, [], {}, 1.5),
    "number": ("1.0", True, None, [1.0], {}, -1.0),
    "whole": ("1", True, 1.5, [1], {}, -1),
    "list": (5, "x", {}, True, 1.5),
    "dict": (5, "x", [], None, True),
}
HUGE = ("1e999", "-1e999", "NaN", "Infinity", "-Infinity", "9" * 10_000, "-" + "9" * 10_000, "9" * 30)


@pytest.fixture(scope="module")
def texts():
    """A report of SGD-SaI with a pending and a fallback tensor, history and schedule, and one of SWAN."""
    torch.manual_seed(0)
    shapes = {f"layers.{layer}.{kind}.weight": (4, 6) for layer in range(3) for kind in ("q", "v")}
    shapes.update({"logit_scale": (), "late.weight": (3,)})
    pairs = [(name, torch.nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]
    optimizer = SGDSaI(pairs, lr=0.2)
    for name, param in pairs:
        param.grad = torch.zeros(3) if name.startswith("late") else torch.randn(param.shape)
    optimizer.step()
    history = [{"step": step, "gsnr": optimizer.measure_now()} for step in (2, 4)]
    report = GSNRReport.from_optimizer(optimizer, {"world_size": 1, "bf16": False}, [0.01, 1.0])
    model = tiny_llama()
    swan = GSNRReport.from_optimizer(SWAN(param_groups(model, "swan", weight_decay=0.1), lr=0.002), {"seed": 1})
    return [dataclasses.replace(report, history=history).to_json(), swan.to_json()]


def put(content, path, value):
    for key in path[:-1]:
        content = content[key]
    content[path[-1]] = value


def with_raw(content, path, raw):
    """JSON with a text in the place of a value that `json` would not write."""
    put(content, path, "@@")
    return json.dumps(content).replace('"@@"', raw)


def shown(path):
    """A path as an error names it."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


def a_field(rng, content, kinds=tuple(NONE_OF)):
    """Path and type of a random field, at the top, in a row or in the history."""
    found = [([name], kind) for name, kind in TOP_FIELDS.items()]
    for rows in ("tensors", "routes"):
        found += [([rows, i, name], ROW_FIELDS[name]) for i, row in enumerate(content[rows]) for name in row]
    for i in range(len(content["history"])):
        found += [(["history", i, "step"], "whole"), (["history", i], "dict"), (["history", i, "gsnr"], "dict")]
    return rng.choice([each for each in found if each[1] in kinds])


def truncated(rng, text):
    return text[: rng.randrange(len(text) - 3)].encode(), "must be JSON but: "


def wrong_type(rng, text):
    content = json.loads(text)
    path, kind = a_field(rng, content)
    value = rng.choice([each for each in NONE_OF[kind] if path[-1] != "layer" or each is not None])
    put(content, path, value)
    where = path[:2] if path[0] == "history" and kind == "dict" else path
    return json.dumps(content).encode(), f"{shown(where)} of a g-SNR report must be "


def huge_number(rng, text):
    content = json.loads(text)
    path, _ = a_field(rng, content, ("number", "whole"))
    where = f"{shown(path)} of a g-SNR report must be "
    return with_raw(content, path, rng.choice(HUGE)).encode(), where


def huge_number_where_anything_may_stand(rng, text):
    content = json.loads(text)
    path = [rng.choice(["options", "run"]), "seed"]
    return with_raw(
        content, path, rng.choice(HUGE)
    ).encode(), f"{shown(path)} of a g-SNR report must be a finite number"


def unknown_schema(rng, text):
    content = json.loads(text)
    content["schema"] = rng.choice([0, -1, 4, 99, "1", 1.0, None, True, [1], {}])
    return json.dumps(content).encode(), "schema must be 1 or 2 or 3 but is "


def missing_field(rng, text):
    content = json.loads(text)
    place = content if rng.random() < 0.3 else rng.choice(content["tensors"] or content["routes"])
    name = rng.choice(sorted(place.keys() - {"schema"}))
    del place[name]
    return json.dumps(content).encode(), name


def unknown_field(rng, text):
    content = json.loads(text)
    place = content if rng.random() < 0.3 else rng.choice(content["tensors"] or content["routes"])
    place["extra"] = rng.choice([1, None, "x", []])
    return json.dumps(content).encode(), "unknown: ['extra']"


def deep_nesting(rng, text):
    content = json.loads(text)
    path, _ = a_field(rng, content)
    depth = rng.choice([100_000, 1_000_000])
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}")])
    return with_raw(content, path, opening * depth + "1" + closing * depth).encode(), "must be nested at most 8 deep"


def nesting_that_json_takes(rng, text):
    content = json.loads(text)
    raw = "[" * 20 + "]" * 20
    return with_raw(content, ["run", "seed"], raw).encode(), "run.seed of a g-SNR report must be nested at most 8 deep"


def twice_the_same_field(rng, text):
    name = rng.choice(["optimizer", "options", "tensors", "schema", "history"])
    return text.replace("{", f'{{"{name}": 1,', 1).encode(), f"{name} of a g-SNR report must stand once"


def not_utf8(rng, text):
    content = bytearray(text.encode())
    place = rng.randrange(len(content))
    content[place] = rng.choice([0xFF, 0xC0, 0x80])
    return bytes(content), f"not text at byte {place};"


def half_a_character(rng, text):
    content = json.loads(text)
    path, _ = a_field(rng, content, ("text",))
    return with_raw(content, path, r'"weight\ud800"').encode(), f"{shown(path)} of a g-SNR report must be text"


def other_file(rng, text):
    junk = bytes(rng.randrange(32, 127) for _ in range(rng.randrange(200)))
    return b"#" + junk, "must be JSON but: "


MUTATIONS = [
    truncated,
    wrong_type,
    huge_number,
    huge_number_where_anything_may_stand,
    unknown_schema,
    missing_field,
    unknown_field,
    deep_nesting,
    nesting_that_json_takes,
    twice_the_same_field,
    not_utf8,
    half_a_character,
    other_file,
]


def refusal(folder, content):
    """The message with which a file is refused."""
    (folder / "gsnr_report.json").write_bytes(content)
    with pytest.raises(ReportError) as caught:
        GSNRReport.load(folder)
    message = str(caught.value)
    assert len(message) < 500
    assert "\n" not in message
    return message


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: each.__name__)
def test_a_mutated_file_is_refused_by_field(mutation, texts, tmp_path):
    for seed in range(16):  # 13 kinds: 208 files
        content, expected = mutation(random.Random(seed), texts[seed % 2])
        message = refusal(tmp_path, content)
        assert expected in message, f"seed {seed}"


def test_what_a_changed_byte_leaves_readable_can_be_shown(texts, tmp_path):
    """A file that is still a report after it was changed at random has a page, a text and Markdown."""
    readable = 0
    for seed in range(80):
        rng = random.Random(seed)
        content = bytearray(texts[seed % 2].encode())
        digits = [place for place, byte in enumerate(content) if chr(byte).isdigit()]
        content[rng.choice(digits)] = ord(rng.choice("0123456789eE.-"))
        (tmp_path / "gsnr_report.json").write_bytes(content)
        try:
            report = GSNRReport.load(tmp_path)
        except ReportError:
            continue
        readable += 1
        assert all((report.to_html(), report.to_text(), report.to_markdown()))
        assert GSNRReport.from_json(report.to_json()) == report
    assert readable > 20


def test_extreme_numbers_that_are_let_through_can_be_drawn(texts):
    content = json.loads(texts[0])
    for row, value in zip(content["tensors"][:4], (1e30, 1e-30, 3e8, 1e-5), strict=True):
        row.update(scale=value, gsnr=value, gsnr_over_sqrt_numel=value, learning_rate=value)
    report = GSNRReport.from_json(json.dumps(content))
    assert "nan" not in report.to_html().lower().replace("nano", "")
    assert all((report.to_text(), report.to_markdown()))
    from hf_sai.report.plots import history_png, report_png

    assert report_png(report)[:4] == history_png(report)[:4] == b"\x89PNG"
    assert report.diff(GSNRReport.from_json(texts[0])).to_text()


MEGABYTES_50 = 50_000_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x" * MEGABYTES_50, "must be JSON"),
        (b'{"schema": 2, "optimizer": "' + b"x" * MEGABYTES_50, "must be JSON"),
        (b'{"schema": 2, "tensors": [' + b"[]," * (MEGABYTES_50 // 3), "at most 4,000,000 items"),
        (b'{"schema": 2, "tensors": [' + b"0.5," * (MEGABYTES_50 // 4) + b"1]}", "at most 4,000,000 items"),
        (b'{"schema": 2, "gsnr_max": ' + b"9" * MEGABYTES_50 + b"}", "tensors of a g-SNR report must be a list"),
        (b" " * MEGABYTES_50, "must be JSON"),
    ],
    ids=["junk", "one string", "lists", "numbers", "one number", "blanks"],
)
def test_50_megabytes_of_junk_take_little_memory(content, message, tmp_path):
    tracemalloc.start()
    try:
        assert message in refusal(tmp_path, content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * MEGABYTES_50


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with open(tmp_path / "gsnr_report.json", "wb") as file:
        os.truncate(file.fileno(), 2**40)  # a terabyte of nothing, which takes no place on disk
    with pytest.raises(ReportError, match=r"at most 67,108,864 bytes but gsnr_report\.json has 1,099,511,627,776"):
        GSNRReport.load(tmp_path)


def test_a_file_that_is_not_there_or_a_folder_is_a_report_error(tmp_path):
    (tmp_path / "gsnr_report.json").mkdir()
    for path, reason in ((tmp_path / "missing.json", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ReportError, match=f"must be a file that can be read but .*{reason}"):
            GSNRReport.load(path)


def test_reports_of_huge_models_stay_far_below_the_bounds():
    """48,000 tensors, as of 61 layers with 256 experts of three matrices, and a history as long as it may be."""
    name = "model.layers.{}.mlp.experts.{}.gate_proj.weight"
    rows = [
        TensorRow(name.format(i % 61, i), f"mlp.experts.{i}.gate_proj", i % 61, (2048, 7168), 2048 * 7168,
                  3831.456789012345, 1.000123456789012, 3831.456789012345, 38.31456789012345, 1, "measured")
        for i in range(480)
    ]  # fmt: skip
    report = GSNRReport("sgd_sai", {}, 0.01, 0.0, 1.0, rows, [], 1, 2)
    text = report.to_json()
    history = thinned([{"step": step, "gsnr": {row.name: row.gsnr / 3 for row in rows}} for step in range(2000)])
    with_history = dataclasses.replace(report, history=history).to_json()
    bytes_of_history, items_of_history = len(with_history) - len(text), with_history.count(",") - text.count(",")
    assert 100 * len(text) + bytes_of_history < schema.MAX_BYTES * 0.6
    assert 100 * sum(map(text.count, ",[{")) + items_of_history < schema.MAX_ITEMS * 0.6


def test_a_long_history_is_thinned_and_keeps_its_end():
    history = [{"step": step, "gsnr": dict.fromkeys(map(str, range(1000)), 1.0)} for step in range(1, 203)]
    assert thinned(history[:200]) == history[:200]
    assert [entry["step"] for entry in thinned(history)] == list(range(2, 203, 2))


@pytest.mark.parametrize("schema", [1, 2])
def test_a_file_of_an_older_schema_is_read_without_what_it_did_not_know(schema, texts):
    content, report = json.loads(texts[0]), GSNRReport.from_json(texts[0])
    rows = [dataclasses.replace(row, factor=1.0, gradient_norm=0.0, weight_rms=0.0) for row in report.tensors]
    expected = dataclasses.replace(report, tensors=rows, schedule=report.schedule if schema == 2 else [])
    content["schema"] = schema
    for row in content["tensors"]:
        for name in NEW_IN_3:
            del row[name]
    if schema == 1:
        del content["schedule"]
    read = GSNRReport.from_json(json.dumps(content))
    assert read == expected
    assert [row.update_rms for row in read.tensors] == [None] * len(rows)
    assert all((read.to_html(), read.to_text(), read.to_markdown()))


def test_the_range_of_learning_rates_is_that_of_tensors_and_schedule(texts):
    report = GSNRReport.from_json(texts[0])
    rates = [row.learning_rate for row in report.tensors if row.status != "pending"]
    assert report.learning_rate_range(report.tensors) == (min(rates) * 0.01, max(rates))
    assert report.learning_rate_range(report.by_status("pending")) is None
    unknown = dataclasses.replace(report, schedule=[])
    assert unknown.learning_rate_range(unknown.tensors) == (min(rates), max(rates))
    layers = {entry["layer"]: entry for entry in report.by_layer()}
    assert list(layers) == [None, 0, 1, 2]
    assert (layers[None]["tensors"], layers[None]["status"]) == (2, "fallback, pending")
    rows = [row for row in report.tensors if row.layer == 1]
    assert layers[1]["learning_rate_range"] == report.learning_rate_range(rows)
    assert layers[1]["scale"] == max(row.scale for row in rows)  # the upper median of two
    assert math.isclose(layers[1]["scale"] / layers[1]["ratio"], math.sqrt(24))
