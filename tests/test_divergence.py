"""A run that diverges in its first steps is told so once; no other is."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from support.models import VOCABULARY, tiny_llama, tiny_lora, tiny_vit
from support.trainers import arguments
from torch import nn
from transformers import Trainer

from hf_sai import GSNRCallback, SaIConfig, SaITrainer, SGDSaI
from hf_sai.divergence import SAMPLES, DivergenceWatch


RATES = {"sgd_sai": 1e-2, "swan": 3e-3}
SAID = "This run seems to diverge: "


def counting():
    """Sequences that can be learned: a start and a stride."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(0, VOCABULARY, (160,), generator=generator)
    found = [(torch.arange(12) * (1 + index % 3) + start) % VOCABULARY for index, start in enumerate(starts)]
    return [{"input_ids": row, "labels": row} for row in found]


def pictures():
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 10, (160,), generator=generator)
    return [
        {"pixel_values": torch.randn(3, 16, 16, generator=generator) * 0.3 + (label - 4.5) / 5, "labels": label}
        for label in labels
    ]


class FromZero(nn.Module):
    """A regression whose weights are 0 at first, so that nothing can be said of an update beside them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x, labels=None):
        return {"loss": (self.linear(x).squeeze(-1) - labels).square().mean()}


def points():
    generator = torch.Generator().manual_seed(4)
    return [{"x": 3 * torch.randn(16, generator=generator), "labels": float(index % 5)} for index in range(160)]


TASKS = {
    "llama": (tiny_llama, counting, {}),
    "lora": (tiny_lora, counting, {"optim_args": "lora_policy=paired"}),
    "vit": (tiny_vit, pictures, {}),
}


def told(folder, caplog, build, data, cls=SaITrainer, **changed):
    """The warnings of a run that is logged every step."""
    settings = {"logging_steps": 1, "max_steps": 14, "remove_unused_columns": False, **changed}
    args = arguments(folder, **settings)
    callbacks = {} if cls is SaITrainer else {"callbacks": [GSNRCallback()]}
    given = {"sai_config": SaIConfig(sai_report=False)} if cls is SaITrainer else {}
    with caplog.at_level(logging.WARNING, logger="hf_sai"):
        trainer = cls(build(), args, train_dataset=data(), **given, **callbacks)
        trainer.train()
    found = [record.getMessage() for record in caplog.records if record.getMessage().startswith(SAID)]
    caplog.clear()
    return found


@pytest.mark.parametrize("warmup_steps", [0, 3])
@pytest.mark.parametrize("optim", RATES)
@pytest.mark.parametrize("task", TASKS)
def test_a_hundred_times_the_rate_is_told_once_and_the_rate_itself_never(tmp_path, caplog, task, optim, warmup_steps):
    build, data, options = TASKS[task]
    options = options if optim == "sgd_sai" else {}
    good = {"optim": optim, "learning_rate": RATES[optim], "warmup_steps": warmup_steps, **options}
    assert told(tmp_path, caplog, build, data, **good) == []
    assert told(tmp_path, caplog, build, data, **{**good, "learning_rate": 3 * RATES[optim]}) == []
    (message,) = told(tmp_path, caplog, build, data, **{**good, "learning_rate": 100 * RATES[optim]})
    assert f"at the peak learning rate of {100 * RATES[optim]:g})" in message
    advised = float(message.partition("learning_rate=")[2].partition(",")[0])
    assert RATES[optim] / 10 <= advised <= 10 * RATES[optim]


def test_a_loss_that_grows_is_told_where_the_weights_are_zero(tmp_path, caplog):
    good = {"optim": "sgd_sai", "max_grad_norm": 0, "max_steps": 20}
    assert told(tmp_path, caplog, FromZero, points, **good, learning_rate=1e-3) == []
    (message,) = told(tmp_path, caplog, FromZero, points, Trainer, **good, learning_rate=0.1)
    assert message.startswith(f"{SAID}its loss began at ")
    assert "try learning_rate=0.01," in message


# ---- the first update, by hand ----


def first(params, update, rate=0.1, peak=None):
    """What is told of an update of the parameters."""
    optimizer = torch.optim.SGD(params, lr=rate)
    if peak is not None:
        for group in optimizer.param_groups:
            group["initial_lr"] = peak
    watch = DivergenceWatch()
    watch.before_step(optimizer)
    with torch.no_grad():
        update()
    for group in optimizer.param_groups:
        group["lr"] = 123.0  # the scheduler has gone on
    return watch, watch.after_step()


def test_update_over_weights_is_the_ratio_of_root_mean_squares():
    """Large tensors count by their size, although as much is read of each."""
    large, small = nn.Parameter(torch.full((50, 4000), 2.0)), nn.Parameter(torch.tensor([30.0, -40.0]))
    assert large.numel() > 100 * SAMPLES
    weights = math.sqrt((200_000 * 4.0 + 2500.0) / 200_002)
    moved = math.sqrt((200_000 * 9.0 + 2.0) / 200_002)

    def update():
        large.add_(3.0), small.sub_(1.0)

    _, message = first([large, small], update, rate=0.1, peak=0.4)
    assert f"is {4 * moved / weights:.2g} times as large as its weights" in message
    assert "peak learning rate of 0.4" in message
    assert f"try learning_rate={0.4 * 0.1 / (4 * moved / weights):.1g}," in message


@pytest.mark.parametrize(("moved", "says"), [(0.99, False), (1.01, True)])
def test_an_update_as_large_as_the_weights_is_the_limit(moved, says):
    param = nn.Parameter(torch.ones(7))
    assert (first([param], lambda: param.add_(moved))[1] is not None) == says


def test_a_step_at_rate_zero_or_one_that_is_skipped_is_not_the_first():
    param = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([param], lr=0.0)
    watch = DivergenceWatch()
    for rate, change, says in ((0.0, 0.0, False), (0.1, 0.0, False), (0.1, 5.0, True), (0.1, 50.0, False)):
        optimizer.param_groups[0]["lr"] = rate
        watch.before_step(optimizer)
        param.data.add_(change)
        assert (watch.after_step() is not None) == says


def test_after_the_first_update_nothing_is_read_any_more():
    param = nn.Parameter(torch.ones(4))
    watch, message = first([param], lambda: param.add_(0.01))
    assert message is None
    watch.before_step(SGDSaI([param]))
    param.data.add_(100.0)
    assert watch.after_step() is None


# ---- what is logged, by hand ----

SERIES = {
    "a good run": ([3.0 - 0.05 * i for i in range(50)], [2.0 - 0.03 * i for i in range(50)], None),
    "noise of batch 1": (
        [0.3, 2.5, 1.9, 2.8, 0.4, 2.2, 3.1, 2.0, 1.5, 2.9] * 4,
        [2.0, 5, 4, 7, 2, 5, 8, 4, 3, 6] * 4,
        None,
    ),
    "spikes": ([2.0, 1.9, 12.0, 14.0, 1.9] * 8, [1.0, 1.0, 30.0, 40.0, 1.0] * 8, None),
    "harder data": ([0.5] * 10 + [3.0] * 30, [1.0] * 10 + [2.5] * 30, None),
    "DPO": ([0.6931, 0.6928, 0.692, 0.6899, 0.687] * 8, [20.0, 15.0, 18.0, 9.0, 12.0] * 8, None),
    "near zero": ([1e-4, 3e-3, -2e-3, 5e-3, 9e-3] * 8, [0.01, 0.2, 0.3, 0.4, 0.2] * 8, None),
    "GRPO, equal rewards": ([0.0] * 40, [0.3] * 3 + [0.0] * 37, None),
    "negative": ([-1.0, -1.5, 0.2, -3.0, -0.5] * 8, [1.0, 9.0, 8.0, 7.0, 9.0] * 8, None),
    "learned to the end": ([2.0 * 0.5**i for i in range(40)], [5.0 * 0.4**i for i in range(40)], None),
    "late": ([2.0] * 50 + [90.0] * 10, [1.0] * 50 + [80.0] * 10, None),
    "layer-wise, spikes": ([2.0, 1.9, 12.0, 14.0, 1.9] * 8, [0.0] * 40, None),
    "grows": ([2.0, 2.2, 6.0, 7.0, 8.0, 9.0], [1.0, 4.0, 6.0, 9.0, 20.0, 9.0], 4),
    "grows, layer-wise": ([2.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0], [0.0] * 7, 5),
    "collapses": ([0.69, 0.71, *[0.693] * 8], [17.0, 20.0, *[0.04] * 8], 6),
    "no number": ([2.0, math.nan, math.nan], [1.0, math.nan, math.nan], 1),
    "no gradient's norm": ([2.0, 2.0, 2.0, 2.0], [1.0, math.nan, 1.0, math.nan], None),
    "weights are gone": ([2.0, 0.0, 0.0, 0.0], [1.0, math.nan, math.nan, math.nan], 2),
}


@pytest.mark.parametrize("name", SERIES)
def test_signs_in_the_logs_are_told_once_and_at_their_place(name):
    losses, norms, place = SERIES[name]
    watch = DivergenceWatch()
    found = [watch.on_log({"loss": a, "grad_norm": b}, 0.3) for a, b in zip(losses, norms, strict=True)]
    assert [index for index, message in enumerate(found) if message] == ([] if place is None else [place])
    assert all("try learning_rate=0.03," in message for message in found if message)


def test_what_fp16_and_other_logs_say_is_no_sign():
    watch = DivergenceWatch()
    assert [watch.on_log({"loss": 2.0, "grad_norm": math.inf}, 0.1, fp16=True) for _ in range(5)] == [None] * 5
    assert [watch.on_log({"eval_loss": math.nan}, 0.1) for _ in range(5)] == [None] * 5
