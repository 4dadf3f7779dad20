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


# Of a steady step. A learning rate that is a tensor takes two calls for a large tensor; rounding that is not the
# kernel's takes copies.
MOST = {
    "GPT-2": {
        "": 40,
        ", after clip_grad_norm_": 30,
        ", lr a tensor": 40,
        ", stochastic_rounding": 100,
        ", kahan_sum": 125,
    },
    LORA: {
        "": 60,
        ", after clip_grad_norm_": 50,
        ", lr a tensor": 60,
        ", paired": 120,
        ", stochastic_rounding": 90,
        ", kahan_sum": 120,
    },
    "Llama-3-8B": {
        "": 700,
        ", after clip_grad_norm_": 500,
        ", lr a tensor": 1150,
        ", stochastic_rounding": 4000,
        ", kahan_sum": 4800,
    },
}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("model", "options"), [(model, options) for model, most in MOST.items() for options in most])
def test_sgd_sai_takes_few_launches_and_reads_nothing_once_all_is_measured(launches, model, options, dtype):
    if not launches.fits(model, f"SGD-SaI{options}", dtype):
        pytest.skip("float32 is not rounded")
    found = launches.count(model, f"SGD-SaI{options}", dtype)
    assert found["steady"] <= MOST[model][options], found["by_name"]
    assert found["first"] <= 20 * found["steady"]
    assert found["reads"] == 0
    assert found["first_reads"] <= 3


def test_adam_reads_nothing_of_a_large_tensor_that_is_not_contiguous(launches):
    from hf_sai.optim.adam_update import AdamBatch, adam_update, new_adam_state

    batch = AdamBatch()
    param = torch.empty(8192, 4096, device="meta").t()
    state = new_adam_state(param)
    batch.append(param, torch.empty_like(param), state["exp_avg"], state["exp_avg_sq"], state["step"])
    with launches.on_meta() as reads, launches.Launches() as counted:
        adam_update(batch, lr=1e-3, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, maximize=False)
    assert (counted.reads, reads) == (0, [])


def test_swan_reads_nothing_and_adam_takes_low_precision_in_lists(launches):
    found = launches.count("GPT-2", "SWAN", BF16)
    assert found["reads"] == 0
    adam = sum(count for name, count in found["by_name"].items() if name.startswith(("_fused_adam", "_foreach_copy")))
    assert adam <= 40


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("model", "batches"), [("GPT-2", 5), (LORA, 5)])
def test_swan_takes_the_same_few_launches_for_each_shape(launches, model, batches, dtype):
    """As many for all matrices of a shape together, but for the lists of pointers; and 65 for Adam and the flags."""
    found = launches.count(model, "SWAN", dtype)
    assert found["steady"] <= 80 * batches + 65, found["by_name"]
    assert found["reads"] == 0


@pytest.mark.parametrize(("whitening", "most"), [("polar", 76), ("polar_express", 52), ("nsds", 42)])
def test_another_shape_takes_so_many_launches_more(launches, whitening, most, monkeypatch):
    shapes = [(768, 3072)] * 4, [(768, 3072)] * 4 + [(768, 2304)] * 4
    found = []
    for some in shapes:
        monkeypatch.setitem(launches.MODELS, "these", lambda some=some: some)
        made = {"SWAN": lambda p: launches.SWAN([{"params": p, "kind": "swan"}], lr=1e-3, whitening=whitening)}
        monkeypatch.setattr(launches, "OPTIMIZERS", made)
        found.append(launches.count("these", "SWAN", BF16)["steady"])
    assert found[1] - found[0] <= most


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
