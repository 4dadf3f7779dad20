"""Measuring without training, given scales, and learning rates between the normalisations."""

from __future__ import annotations

import itertools
import math
import random

import numpy
import pytest
import torch
from support.models import tiny_llama, tiny_lora, token_blocks
from support.trainers import arguments, trainable

import hf_sai
from hf_sai import GSNRReport, SaITrainer, SGDSaI
from hf_sai.optim import convert_lr, measure_gsnr
from hf_sai.optim.gsnr import NORMALIZATIONS


def batches(count, seed=3):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, 32, (4, 10), generator=generator) for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def test_one_batch_gives_what_the_first_step_measures():
    model = tiny_llama()
    (batch,) = batches(1)
    rows = measure_gsnr(model, [batch])
    optimizer = SGDSaI(model.named_parameters())
    model(**batch).loss.backward()
    optimizer.step()
    for measured, stepped in zip(rows, optimizer.gsnr_statistics(), strict=True):
        assert (measured.name, measured.status) == (stepped.name, stepped.status)
        assert measured.gsnr == pytest.approx(stepped.gsnr, rel=1e-9)


def test_several_batches_are_averaged_and_nothing_is_touched():
    model = tiny_llama()
    kept = trainable(model)
    marker = torch.ones_like(model.lm_head.weight)
    model.lm_head.weight.grad = marker
    singles = [measure_gsnr(model, [batch]) for batch in batches(3)]
    together = measure_gsnr(model, batches(3))
    for index, row in enumerate(together):
        assert row.gsnr == pytest.approx(sum(rows[index].gsnr for rows in singles) / 3, rel=1e-12)
    assert model.lm_head.weight.grad is marker
    assert all(torch.equal(value, kept[name]) for name, value in trainable(model).items())


def test_lora_a_is_pending_without_an_update():
    rows = measure_gsnr(tiny_lora(), batches(2))
    assert {row.status for row in rows if "lora_A" in row.name} == {"pending"}
    assert {row.status for row in rows if "lora_B" in row.name} == {"measured"}


def test_own_loss_function_and_what_is_refused():
    model = torch.nn.Linear(3, 2)
    rows = measure_gsnr(model, [torch.randn(5, 3)], loss_fn=lambda m, x: m(x).square().sum())
    assert [row.name for row in rows] == ["weight", "bias"]
    with pytest.raises(ValueError, match="needs a batch, but there was none"):
        measure_gsnr(model, [])
    with pytest.raises(ValueError, match="needs a parameter with requires_grad"):
        measure_gsnr(model.requires_grad_(False), [torch.randn(5, 3)])


# ---- Given scales ----


def run_with(model, normalize="none", steps=3, **options):
    optimizer = SGDSaI(model.named_parameters(), lr=0.01, normalize=normalize, **options)
    for batch in batches(steps, seed=9):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("measured_under", NORMALIZATIONS)
@pytest.mark.parametrize("used_under", NORMALIZATIONS)
def test_given_scales_are_used_exactly(measured_under, used_under):
    first = run_with(tiny_llama(), measured_under).gsnr_statistics()
    second = run_with(tiny_llama(seed=4), used_under, gsnr=first).gsnr_statistics()
    assert [row.gsnr for row in second] == [row.gsnr for row in first]
    assert {row.status for row in second} == {"given"}
    if used_under == measured_under:
        expected = [row.scale for row in first]
    elif used_under == "rms":  # the first run does not say, so it is this one's
        expected = [row.gsnr / rms_of_first_update(tiny_llama(seed=4), first) for row in first]
    else:
        expected = [row.gsnr / (max(row.gsnr for row in first) if used_under == "max" else 1.0) for row in first]
    assert [row.scale for row in second] == pytest.approx(expected, rel=1e-12 if used_under != "rms" else 1e-6)


def rms_of_first_update(model, rows):
    model(**batches(1, seed=9)[0]).loss.backward()
    scales = {row.name: row.gsnr for row in rows}
    scaled = torch.cat([scales[name] * p.grad.double().flatten() for name, p in model.named_parameters()])
    return scaled.square().mean().sqrt().item()


def test_given_scales_survive_a_resume_and_guard_the_first_step():
    param = torch.nn.Parameter(torch.zeros(4))
    source = measure_gsnr(torch.nn.Linear(4, 1, bias=False), [torch.randn(3, 4)], lambda m, x: m(x).sum())
    (row,) = source
    other = type(row)("w", (4,), 4, 0, 7.5, 7.5, 1, "measured")
    optimizer = SGDSaI([("w", param)], lr=0.1, gsnr=[other], weight_decay=0.0)
    param.grad = torch.tensor([1.0, math.nan, 0.0, 0.0])
    optimizer.step()
    assert torch.equal(param.detach(), torch.zeros(4))
    gradient = torch.tensor([1.0, -2.0, 0.5, 0.0])
    param.grad = gradient
    optimizer.step()
    torch.testing.assert_close(param.detach(), -0.1 * 7.5 * gradient)
    resumed = SGDSaI([("w", torch.nn.Parameter(param.detach().clone()))])
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.gsnr_statistics() == optimizer.gsnr_statistics()


def test_pending_rows_are_measured_and_fallbacks_stay():
    rows = run_with(tiny_lora(), steps=1).gsnr_statistics()
    second = run_with(tiny_lora(), gsnr=rows).gsnr_statistics()
    assert {row.status for row in second if "lora_B" in row.name} == {"given"}
    assert {row.status for row in second if "lora_A" in row.name} == {"measured"}


def test_reports_that_do_not_fit_list_what_is_wrong():
    rows = run_with(tiny_llama()).gsnr_statistics()
    model = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(3, 3, bias=False), "new": torch.nn.Linear(1, 1)})
    with pytest.raises(ValueError, match=r"gsnr must hold the model's own tensors") as caught:
        SGDSaI(model.named_parameters(), gsnr=rows)
    for part in ("model.embed_tokens.weight is not in the model", "and ", "more; give the report"):
        assert part in str(caught.value)
    row = type(rows[0])("w", (2,), 2, 0, 1.5, 1.5, 1, "measured")
    with pytest.raises(ValueError, match=r"w has shape \(3,\), in gsnr \(2,\); give"):
        SGDSaI([("w", torch.nn.Parameter(torch.ones(3)))], gsnr=[row])


def test_optim_args_take_a_report_file(tmp_path):
    first = SaITrainer(tiny_llama(), arguments(tmp_path / "first", max_steps=1), train_dataset=token_blocks())
    first.train()
    source = tmp_path / "first" / "gsnr_report.json"
    for place in (source, source.parent):
        args = arguments(tmp_path / "second", max_steps=1, optim_args=f"gsnr={place},normalize=max")
        second = SaITrainer(tiny_llama(seed=3), args, train_dataset=token_blocks(seed=8))
        second.train()
        rows = GSNRReport.load(tmp_path / "second").tensors
        assert [row.gsnr for row in rows] == [row.gsnr for row in GSNRReport.load(source).tensors]
        assert {row.status for row in rows} == {"given"}
    with pytest.raises(ValueError, match="a g-SNR report must be a file, a folder or a Hub repository"):
        hf_sai.create_optimizer("sgd_sai", tiny_llama(), gsnr="nobody/nothing")


# ---- Learning rates ----


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(NORMALIZATIONS, 2)))
def test_converted_learning_rate_gives_the_same_training(first, second):
    measured = run_with(tiny_llama())
    known = (measured.gsnr_statistics(), measured.param_groups[0]["gsnr_rms"])
    rates = {first: convert_lr(0.01, "none", first, *known)}
    rates[second] = convert_lr(rates[first], first, second, *known)
    models = []
    for normalize, lr in rates.items():
        model = tiny_llama()
        optimizer = SGDSaI(model.named_parameters(), lr=lr, normalize=normalize, weight_decay=0.0)
        for batch in batches(3, seed=9):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(trainable(model))
    for name, value in models[0].items():
        torch.testing.assert_close(value, models[1][name], rtol=1e-4, atol=1e-6)
    assert convert_lr(rates[second], second, "none", *known) == pytest.approx(0.01)


def test_conversions_that_cannot_be_made():
    assert convert_lr(0.3, "max", "max", []) == 0.3
    with pytest.raises(ValueError, match=r"gsnr_rms must be finite and > 0 but is 0\.0; pass optimizer\.param_groups"):
        convert_lr(0.1, "none", "rms", [])
    with pytest.raises(ValueError, match="must be one of none, max, rms but is 'mean'"):
        convert_lr(0.1, "none", "mean", [])
    with pytest.raises(ValueError, match="needs a measured g-SNR, but none is"):
        convert_lr(0.1, "none", "max", SGDSaI([torch.nn.Parameter(torch.ones(2))]).gsnr_statistics())


# ---- What is measured, and what it leaves behind ----


class Noisy(torch.nn.Module):
    """Batch norm, dropout, noise from every generator, and a loss where there are labels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.dropout, self.head = torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.head.eval()

    def forward(self, x, labels=None, **others):
        self.calls = self.calls + 1  # another tensor in its place
        self.train()
        logits = self.head(self.dropout(self.norm(x))) * (1 + 0.1 * random.random() + 0.1 * numpy.random.rand())
        if labels is None:
            return {"logits": logits}
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def random_states():
    return random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()


def test_everything_is_as_it_was():
    model = Noisy()
    model.head.weight.grad = gradient = torch.ones(3, 4)
    batch = {"x": torch.randn(8, 4), "labels": torch.arange(8) % 3, "flag": True, "names": ["a"] * 8}
    calls = model.calls

    def before():
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return random_states(), [module.training for module in model.modules()], list(batch), buffers

    def popping(model, batch):
        labels = batch.pop("labels")
        return torch.nn.functional.cross_entropy(model(**batch)["logits"], labels)

    first = before()
    singles = [measure_gsnr(model, [batch]), measure_gsnr(model, [batch], popping)]
    assert singles[0] == singles[1]  # the same random numbers, and the labels are still there
    second = before()
    assert first[:3] == second[:3]
    assert all(torch.equal(first[3][name], second[3][name]) for name in first[3])
    assert model.calls is calls
    assert model.head.weight.grad is gradient
    assert torch.equal(gradient, torch.ones(3, 4))
    with pytest.raises(KeyError):
        measure_gsnr(model, [batch, {"x": None}], lambda model, batch: model(**batch)[batch["x"]])
    assert random_states() == first[0]
    assert model.calls is calls


def test_a_trainers_loss_is_measured_by_its_compute_loss(tmp_path):
    """Label smoothing, which the model's own loss has not."""
    args = arguments(tmp_path, label_smoothing_factor=0.3)
    trainer = SaITrainer(tiny_llama(), args, train_dataset=token_blocks())
    data = batches(2)
    named = dict(trainer.model.named_parameters())
    expected = dict.fromkeys(named, 0.0)
    for batch in data:
        loss = trainer.compute_loss(trainer.model, dict(batch))
        for name, gradient in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
            least = math.sqrt(gradient.numel() - 1)
            expected[name] += max((gradient.norm() / (gradient.std() + 1e-8)).item(), least) / 2
    found = {row.name: row.gsnr for row in measure_gsnr(trainer.model, data, trainer.compute_loss)}
    assert found == pytest.approx(expected, rel=1e-4)
    plain = {row.name: row.gsnr for row in measure_gsnr(trainer.model, data)}
    assert max(abs(plain[name] / found[name] - 1) for name in found) > 1e-3


@pytest.mark.parametrize(
    ("batch", "loss_fn", "message"),
    [
        ({"x": torch.ones(2, 4)}, None, "needs a loss, but Noisy gives none for a batch with x; pass loss_fn="),
        (torch.ones(2, 4), None, "needs a loss, but Noisy gives none for a batch of a Tensor; pass loss_fn="),
        ({"x": torch.ones(2, 4)}, lambda m, b: m(**b), "needs one number with a gradient as the loss, but got a dict"),
        ({"x": torch.ones(2, 4)}, lambda m, b: m(**b)["logits"], r"the loss, but got a tensor of shape \(2, 3\)"),
        ({"x": torch.ones(2, 4)}, lambda m, b: torch.ones(()), r"the loss, but got a tensor of shape \(\)"),
    ],
)
def test_what_is_no_loss_is_named(batch, loss_fn, message):
    with pytest.raises(ValueError, match=message):
        measure_gsnr(Noisy(), [batch], loss_fn)
