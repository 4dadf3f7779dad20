"""Launches and host reads of a step on CUDA, counted on `meta` tensors of true shapes; see benchmarks/launches.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
LORA = "LoRA r=16 on Llama-3-8B"
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def launches(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import launches

    return launches


@pytest.mark.parametrize(
    ("sizes", "lists", "scalars", "expected"),
    [
        ([1], 3, False, 1),
        ([1] * 48, 3, False, 1),
        ([1] * 49, 3, False, 2),
        ([1] * 96, 1, True, 1),
        ([1] * 97, 1, True, 2),
        ([65536 * 320], 3, False, 1),
        ([65536 * 320 + 1], 3, False, 2),
        ([65536 * 200, 65536 * 200], 3, False, 2),
        ([0, 0], 3, False, 0),
    ],
)
def test_lists_are_cut_as_multi_tensor_apply_cuts_them(launches, sizes, lists, scalars, expected):
    assert launches.launches_of_lists(sizes, lists, scalars) == expected


@pytest.mark.parametrize(("model", "expected"), [("GPT-2", 7), (LORA, 10), ("Llama-3-8B", 384)])
def test_the_count_of_torchs_own_is_what_its_kernels_say(launches, model, expected):
    assert launches.count(model, "torch SGD fused", F32)["steady"] == expected


@pytest.mark.parametrize(
    ("model", "optimizer", "dtype", "most"),
    [
        ("GPT-2", "SGD-SaI", F32, 60),
        ("GPT-2", "SGD-SaI", BF16, 60),
        ("GPT-2", "SGD-SaI, lr a tensor", BF16, 60),
        ("Llama-3-8B", "SGD-SaI", BF16, 900),
        (LORA, "SGD-SaI", F32, 60),
        (LORA, "SGD-SaI", BF16, 60),
        (LORA, "SGD-SaI, paired", F32, 120),
        (LORA, "SGD-SaI, paired", BF16, 120),
        (LORA, "SGD-SaI, stochastic_rounding", BF16, 120),
        (LORA, "SGD-SaI, kahan_sum", BF16, 120),
    ],
)
def test_sgd_sai_takes_few_launches_and_reads_nothing_once_all_is_measured(launches, model, optimizer, dtype, most):
    found = launches.count(model, optimizer, dtype)
    assert found["steady"] <= most, found["by_name"]
    assert found["first"] <= 20 * found["steady"]
    assert found["reads"] == 0
    assert found["first_reads"] <= 3


def test_swan_reads_nothing_and_adam_takes_low_precision_in_lists(launches):
    found = launches.count("GPT-2", "SWAN", BF16)
    assert found["reads"] == 0
    adam = sum(count for name, count in found["by_name"].items() if name.startswith(("_fused_adam", "_foreach_copy")))
    assert adam <= 40


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("model", "batches"), [("GPT-2", 5), (LORA, 5)])
def test_swan_takes_the_same_few_launches_for_each_shape(launches, model, batches, dtype):
    """As many for all matrices of a shape together, but for the lists of pointers; and 60 for Adam and the flags."""
    found = launches.count(model, "SWAN", dtype)
    assert found["steady"] <= 100 * batches + 80, found["by_name"]
    assert found["reads"] == 0


def test_swan_reads_nothing_where_its_rate_is_on_the_device(launches, monkeypatch):
    def refused(*args):
        raise AssertionError("the host reads a tensor")

    made = {"SWAN, lr a tensor": lambda params: launches._by_tensor(launches.SWAN(launches._routed(params)))}
    monkeypatch.setattr(launches, "OPTIMIZERS", made)
    for name in ("item", "tolist", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, refused)
    assert launches.count("GPT-2", "SWAN, lr a tensor", BF16)["reads"] == 0


@pytest.mark.parametrize(("model", "optimizer"), [("GPT-2", "SGD-SaI"), (LORA, "SGD-SaI, paired"), (LORA, "SGD-SaI")])
def test_the_committed_table_is_what_is_counted(launches, model, optimizer):
    written = json.loads((BENCHMARKS / "results" / "launches.json").read_text())["counts"]
    found = launches.count(model, optimizer, BF16)
    assert written[f"{model}, bfloat16, {optimizer}"] == found
    row = f"| {model} | bfloat16 | {optimizer} |"
    (line,) = [
        line for line in (BENCHMARKS / "results" / "launches.md").read_text().splitlines() if line.startswith(row)
    ]
    assert f"-> {found['steady']:,} |" in line
