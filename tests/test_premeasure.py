"""Scales from before the first update: those that the training itself would measure, and nothing else is changed."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from datasets import Dataset
from datasets import IterableDataset as HubStream
from support.models import VOCABULARY, tiny_llama, tiny_lora, token_blocks, word_tokenizer
from support.trainers import arguments, trainable
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlamaForSequenceClassification, Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from hf_sai import GSNRCallback, GSNRReport, OptionError, SaIConfig, SaITrainer, make_trainer


# TRL 1.16's DPOTrainer calls these on transformers 5.23.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able` is deprecated:FutureWarning"),
    pytest.mark.usefixtures("no_picture"),
]


class Plain(nn.Module):
    """A classifier without a loss of its own, that takes anything in a batch."""

    def __init__(self, p=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.dropout, self.head = nn.BatchNorm1d(4), nn.Dropout(p).eval(), nn.Linear(4, 3)

    def forward(self, x, labels=None, **others):
        """Draws from every generator, and uses torch's."""
        random.random(), numpy.random.rand()
        return {"logits": self.head(self.dropout(self.norm(x)))}


def rows(count=48, **others):
    generator = torch.Generator().manual_seed(5)
    return [{"x": torch.randn(4, generator=generator), "labels": index % 3, **others} for index in range(count)]


def to_five(outputs, labels=None, num_items_in_batch=None):
    """Not the loss of any model."""
    return (outputs["logits"][:, 0] - 5).square().sum() / 4 + outputs["logits"][:, 1].mean()


class OwnLoss(SaITrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs["logits"], labels, label_smoothing=0.3)
        return (loss, outputs) if return_outputs else loss


class OwnStep(SaITrainer):
    """A training step that computes its loss and its gradients itself."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = to_five(model(inputs.pop("x")))
        loss.backward()
        return loss.detach()


class WithFlags(SaITrainer):
    """Batches of more than tensors."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert inputs["flag"] is True
        assert inputs["names"] == ["a"] * 4
        assert inputs["none"] is None
        return to_five(model(inputs["x"]))


def flagged(batch):
    return {"x": torch.stack([row["x"] for row in batch]), "flag": True, "names": ["a"] * len(batch), "none": None}


def words(*numbers):
    return " ".join(f"w{number % (VOCABULARY - 1)}" for number in numbers)


def texts(**columns):
    data = [{name: words(*(row * k for k in range(*each))) for name, each in columns.items()} for row in range(24)]
    return {"train_dataset": Dataset.from_list(data), "processing_class": word_tokenizer()}


def dpo():
    columns = {"prompt": (1, 4), "chosen": (4, 9), "rejected": (9, 14)}
    return {"model": tiny_llama(), "ref_model": tiny_llama(), **texts(**columns)}


def reward():
    torch.manual_seed(0)
    config = tiny_llama().config
    config.pad_token_id, config.num_labels = VOCABULARY - 1, 1
    return {"model": LlamaForSequenceClassification(config), **texts(chosen=(1, 9), rejected=(9, 17))}


# The class, what it is made with, and settings; without arguments of its own it takes all columns.
HOSTS = {
    "compute_loss_func": (SaITrainer, lambda: {"model": Plain(), "compute_loss_func": to_five}, {}),
    "compute_loss": (OwnLoss, lambda: {"model": Plain(0.5)}, {}),
    "training_step": (OwnStep, lambda: {"model": Plain()}, {}),
    "anything": (WithFlags, lambda: {"model": Plain(), "data_collator": flagged}, {}),
    "label smoothing": (
        SaITrainer,
        lambda: {"model": tiny_llama(), "train_dataset": token_blocks()},
        {"label_smoothing_factor": 0.2},
    ),
    "accumulation": (
        SaITrainer,
        lambda: {"model": Plain(0.5), "compute_loss_func": to_five},
        {"gradient_accumulation_steps": 3},
    ),
    "SFT": (SFTTrainer, lambda: {"model": tiny_lora(), **texts(text=(0, 6))}, {"cls": SFTConfig, "bf16": False}),
    "DPO": (DPOTrainer, dpo, {"cls": DPOConfig, "bf16": False}),
    "Reward": (RewardTrainer, reward, {"cls": RewardConfig, "bf16": False}),
}


def run(folder, host, batches=0, **changed):
    """A training by one of the hosts, and what it was when its first step began."""
    cls, make, settings = HOSTS[host]
    columns = {} if "cls" in settings else {"remove_unused_columns": False}
    args = arguments(folder, max_steps=4, max_grad_norm=0, seed=7, **columns, **settings, **changed)
    options = {"train_dataset": rows(), **make()}
    first = First()
    config = SaIConfig(gsnr_premeasure_batches=batches)
    trainer = make_trainer(cls)(args=args, callbacks=[first], sai_config=config, **options)
    trainer.train()
    return trainer, first


class First(TrainerCallback):
    """Random states, buffers, modes, gradients and weights when the first step begins."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.random = (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist())
            self.weights = trainable(model)
            self.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            self.modes = [module.training for module in model.modules()]
            self.gradients = [param.grad for param in model.parameters()]


def logged(trainer):
    """The host's own logs."""
    clocks = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    return [
        {key: value for key, value in entry.items() if key not in clocks and not key.startswith("gsnr/")}
        for entry in trainer.state.log_history
        if not any(key.startswith("gsnr/") for key in entry)
    ]


def assert_equal(found, expected, rel=1e-4):
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rel, atol=1e-7)


@pytest.mark.parametrize("host", HOSTS)
def test_measured_before_is_what_the_training_would_measure_and_changes_nothing_else(tmp_path, host):
    """Dropout included. Then the run is the same as one that is given these scales by a report."""
    expected, start = run(tmp_path / "plain", host)
    found, first = run(tmp_path / "before", host, batches=1)
    measured = {row.name: row for row in GSNRReport.load(tmp_path / "plain").tensors}
    given = [row for row in GSNRReport.load(tmp_path / "before").tensors if row.status == "given"]
    assert len(given) == sum(row.step == 1 and row.status == "measured" for row in measured.values())
    assert {row.name: row.gsnr for row in given} == pytest.approx(
        {row.name: measured[row.name].gsnr for row in given}, rel=1e-4
    )
    assert first.random == start.random
    assert first.modes == start.modes
    assert first.gradients == start.gradients == [None] * len(start.gradients)
    for one, other in ((first.weights, start.weights), (first.buffers, start.buffers)):
        assert all(torch.equal(one[name], other[name]) for name in other)
    assert_equal(trainable(found.model), trainable(expected.model))
    for one, other in zip(logged(found), logged(expected), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("optim", ["sgd_sai", "sgd_sai_layerwise"])
def test_several_updates_are_averaged_with_as_many_batches_as_an_update_has(tmp_path, optim):
    """By hand: the gradients of the first updates at the weights of the start."""
    extra = {} if optim.endswith("layerwise") else {"gradient_accumulation_steps": 2}
    seen = []

    class Spy(SaITrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            seen.append(inputs["x"].clone())
            return to_five(model(inputs["x"]))

    args = arguments(tmp_path, optim=optim, max_grad_norm=0, remove_unused_columns=False, max_steps=4, **extra)
    config = SaIConfig(gsnr_premeasure_batches=3)
    trainer = Spy(Plain(), args, train_dataset=rows(), sai_config=config)
    trainer.train()
    size = args.gradient_accumulation_steps
    assert len(seen) == (3 + 4) * size
    assert all(torch.equal(a, b) for a, b in zip(seen[: 3 * size], seen[3 * size : 6 * size], strict=True))
    samples = []
    for update in range(3):
        model = Plain().train()
        for x in seen[update * size : (update + 1) * size]:
            (to_five(model(x)) / size).backward()
        samples.append({name: p.grad for name, p in model.named_parameters()})
    for row in GSNRReport.load(tmp_path).tensors:
        gradients = [sample[row.name] for sample in samples]
        expected = sum((g.norm() / g.std(correction=1)).item() for g in gradients) / 3
        assert row.gsnr == pytest.approx(expected, rel=1e-4)
        assert row.status == "given"


# ---- Data that can be read once ----


class Once(IterableDataset):
    """All that iterate share one pass over the rows."""

    def __init__(self, data):
        self.stream = iter(data)

    def __iter__(self):
        yield from self.stream


class OnceOnly(Once):
    """Its own iterator."""

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.stream)


class OwnLoader(SaITrainer):
    """A loader that is no DataLoader."""

    def get_train_dataloader(self):
        return self.make(DataLoader(self.train_dataset, batch_size=4))


@pytest.mark.parametrize("batches", [0, 1, 3, 20])
@pytest.mark.parametrize("source", ["once", "own iterator", "hub stream", "list"])
def test_a_stream_loses_no_batch(tmp_path, source, batches):
    """Every row is trained, in the same order, though more is asked for than there is."""
    data = rows(32)
    seen = []

    class Spy(OwnLoader if source == "list" else SaITrainer):
        make = staticmethod(list)

        def training_step(self, model, inputs, num_items_in_batch=None):
            if self.state.global_step or not batches or self.premeasured:
                seen.append(inputs["x"].clone())
            return super().training_step(model, inputs, num_items_in_batch)

        premeasured = False

    class Begin(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            trainer.premeasured = True

    plain = [{"x": row["x"].tolist(), "labels": row["labels"]} for row in data]
    dataset = {
        "once": lambda: Once(data),
        "own iterator": lambda: OnceOnly(data),
        "hub stream": lambda: HubStream.from_generator(lambda: iter(plain)).with_format("torch"),
        "list": lambda: data,
    }[source]()
    args = arguments(tmp_path, remove_unused_columns=False, max_steps=8)
    config = SaIConfig(gsnr_premeasure_batches=batches)
    trainer = Spy(
        Plain(), args, train_dataset=dataset, compute_loss_func=to_five, sai_config=config, callbacks=[Begin()]
    )
    trainer.train()
    assert trainer.state.global_step == 8
    torch.testing.assert_close(torch.cat(seen), torch.stack([row["x"] for row in data]))


def test_a_loader_that_can_neither_be_read_again_nor_handed_on_is_refused(tmp_path):
    class Spy(OwnLoader):
        make = staticmethod(lambda loader: (batch for batch in loader))

    args = arguments(tmp_path, remove_unused_columns=False, max_steps=8)
    config = SaIConfig(gsnr_premeasure_batches=1)
    trainer = Spy(Plain(), args, train_dataset=rows(), compute_loss_func=to_five, sai_config=config)
    with pytest.raises(OptionError, match="reads batches that the training needs too, but the generator that"):
        trainer.train()


def test_the_second_epoch_and_the_second_training_read_as_ever(tmp_path):
    """What was read before is given out once."""
    counts = []
    for batches in (0, 2):
        trainer = SaITrainer(
            Plain(),
            arguments(tmp_path, remove_unused_columns=False, max_steps=-1, num_train_epochs=2),
            train_dataset=rows(16),
            compute_loss_func=to_five,
            sai_config=SaIConfig(gsnr_premeasure_batches=batches),
        )
        trainer.train()
        trainer.train()
        counts.append((trainer.state.global_step, trainer.state.epoch))
    assert counts == [(8, 2.0)] * 2


def test_without_the_trainer_there_is_no_loss_to_measure(tmp_path):
    args = arguments(tmp_path)
    callback = GSNRCallback(config=SaIConfig(gsnr_premeasure_batches=1))
    trainer = Trainer(tiny_llama(), args, train_dataset=token_blocks(), callbacks=[callback])
    with pytest.raises(OptionError, match="measures the trainer's own loss, but the callback was made without the tr"):
        trainer.train()
