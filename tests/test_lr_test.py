"""Short trainings of a Trainer: each is what a training of its own would be, and nothing of them is left."""

from __future__ import annotations

import copy
import math
import random

import numpy
import pytest
import torch
from support.models import tiny_llama, tiny_lora, token_blocks
from support.processes import forked
from support.trainers import arguments, files_below, trainable
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

import hf_sai
from hf_sai import OptionError, SaITrainer, cli, lr_find, lr_test
from hf_sai.lr_test import LRTest, Trial
from hf_sai.rehearsal import rehearse


pytestmark = pytest.mark.usefixtures("no_picture")


class Noisy(nn.Module):
    """BatchNorm, dropout, and numbers of every generator; counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm, self.dropout = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3)
        self.still, self.head = nn.Dropout(0.5).eval(), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x, labels=None):
        self.calls += 1
        hidden = self.still(self.dropout(self.norm(self.body(x)))) * (
            1 + 0.01 * (random.random() + numpy.random.rand())
        )
        return {"loss": nn.functional.cross_entropy(self.head(hidden), labels)}


def rows(count=96):
    generator = torch.Generator().manual_seed(5)
    return [{"x": torch.randn(4, generator=generator), "labels": index % 3} for index in range(count)]


def with_checkpoints():
    return tiny_lora(lora_dropout=0.1)


PAIRED = {"optim_args": "lora_policy=paired"}
CASES = {
    "BatchNorm and dropout": (Noisy, {}),
    "full, SWAN": (tiny_llama, {"optim": "swan", "bf16": True}),
    "AdamW, accumulated": (Noisy, {"optim": "adamw_torch", "gradient_accumulation_steps": 2}),
    "paired LoRA, checkpoints": (
        with_checkpoints,
        {**PAIRED, "gradient_checkpointing": True, "neftune_noise_alpha": 5},
    ),
    "LoRA, SWAN": (with_checkpoints, {"optim": "swan"}),
    "layer-wise": (tiny_llama, {"optim": "sgd_sai_layerwise", "max_grad_norm": 0}),
}


def make(folder, build, cls=SaITrainer, **changed):
    data = rows() if build is Noisy else token_blocks(96)
    args = arguments(folder, **{"logging_steps": 1, "warmup_steps": 2, "learning_rate": 0.02, **changed})
    return cls(build(), args, train_dataset=data)


def everything(trainer):
    """All that a test may not change, in values that can be compared."""
    model = trainer.model
    return {
        "weights": {name: value.tolist() for name, value in model.state_dict().items()},
        "gradients": [param.grad for param in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [[len(value) for key, value in vars(m).items() if key.endswith("hooks")] for m in model.modules()],
        "fields": [sorted(vars(module)) for module in model.modules()],
        "random": (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()),
        "trainer": {name: id(value) for name, value in vars(trainer).items()},
        "state": vars(trainer.state) | {"stateful_callbacks": None},
        "control": vars(trainer.control).copy(),
    }


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left_and_the_training_is_the_same_bit_for_bit(tmp_path, case):
    build, changed = CASES[case]
    expected = make(tmp_path / "plain", build, **changed)
    expected.train()
    trainer = make(tmp_path / "tested", build, **changed)
    before = everything(trainer)
    found = lr_find(trainer, updates=6)
    assert everything(trainer) == before
    assert files_below(tmp_path / "tested") == []
    assert len({trial.losses[0] for trial in found.trials}) == 1  # the same start, batch and dropout
    assert len({tuple(trial.losses) for trial in found.trials}) == 7
    trainer.train()
    weights = trainable(expected.model)
    assert all(torch.equal(value, weights[name]) for name, value in trainable(trainer.model).items())
    losses = [[entry.get("loss") for entry in each.state.log_history] for each in (trainer, expected)]
    assert losses[0] == losses[1]


def test_an_optimizer_that_has_a_state_gets_it_back(tmp_path):
    """One of the user's own, in the middle of its life."""
    pair = []
    for tests in (0, 2):
        model = Noisy()
        optimizer = hf_sai.create_optimizer("sgd_sai", model, lr=0.02, momentum=0.8)
        args = arguments(tmp_path, learning_rate=0.02, max_steps=3)
        trainer = Trainer(model, args, train_dataset=rows(), optimizers=(optimizer, None))
        trainer.train()
        before = copy.deepcopy(optimizer.state_dict())
        for _ in range(tests):
            lr_find(trainer, updates=6)
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        for name, state in before["state"].items():
            assert torch.equal(after["state"][name]["momentum_buffer"], state["momentum_buffer"])
        trainer.train()
        pair.append(trainable(model))
    assert all(torch.equal(pair[0][name], value) for name, value in pair[1].items())


@pytest.mark.parametrize(("build", "changed"), [CASES[name] for name in list(CASES)[:5]], ids=list(CASES)[:5])
def test_a_trial_is_what_a_training_at_that_rate_is(tmp_path, build, changed):
    shares = [0.25, 0.5, 1.0, 1.0, 1.0, 1.0]
    found = rehearse(
        make(tmp_path, build, **changed),
        6,
        lambda rehearsal: [
            rehearsal.run([rate * share for share in shares], lambda losses: False) for rate in (0.3, 0.01)
        ],
    )

    class Scheduled(SaITrainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: [*shares, 0.0][step])
            self._created_lr_scheduler = True
            return self.lr_scheduler

    for rate, losses in zip((0.3, 0.01), found, strict=True):
        trainer = make(tmp_path, build, Scheduled, **{**changed, "learning_rate": rate})
        trainer.train()
        assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == pytest.approx(
            losses, rel=1e-4
        )


class Square(nn.Module):
    """`20 w^2`, whatever the batch."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0]))

    def forward(self, x, labels=None):
        return {"loss": 20.0 * self.w.square().sum() + 0.0 * x.sum()}


def test_rates_losses_and_suggestion_of_a_square_by_hand(tmp_path):
    """Gradient descent multiplies w by 1 - 40 rate; above 0.05 it diverges."""
    trainer = make(tmp_path, Noisy, Trainer, optim="sgd", max_grad_norm=0)
    trainer.model = trainer.model_wrapped = Square()
    found = lr_find(trainer)
    assert [trial.learning_rate for trial in found.trials] == pytest.approx([1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1])
    for trial in found.trials:
        w, expected = 1.0, []
        for share in [0.2, 0.4, 0.6, 0.8, *(left / 10 for left in range(10, 0, -1))]:
            expected.append(20.0 * w * w)
            w *= 1.0 - 40.0 * trial.learning_rate * share
            if min(expected[-2:]) > 3 * 20.0 and len(expected) > 1:
                break
        assert trial.losses == pytest.approx(expected, rel=1e-4, abs=1e-12)
    assert [bool(trial.last) for trial in found.trials] == [True] * 6 + [False]
    assert found.best.learning_rate == pytest.approx(0.03)
    assert found.suggestion == pytest.approx(0.03)  # the rate above diverged: no parabola
    assert "diverged after" in found.to_text()
    assert found.is_clear


def trials(scores, noise=0.0):
    """Ten updates each; the last four have these means."""
    return [
        Trial(rate, [1.0] * 6 + [score - noise, score + noise] * 2, 10)
        if math.isfinite(score)
        else Trial(rate, [9.0], 10)
        for rate, score in scores.items()
    ]


def test_the_suggestion_is_the_lowest_point_of_a_parabola():
    """Of (log10 rate + 2.3)^2, through 1e-3, 3e-3 and 1e-2: unevenly spaced."""
    found = LRTest(
        "swan", 5e-5, trials({rate: (math.log10(rate) + 2.3) ** 2 for rate in (1e-5, 1e-3, 3e-3, 1e-2, 0.1)})
    )
    assert found.best.learning_rate == 3e-3
    assert found.suggestion == pytest.approx(10**-2.3, rel=0.01)
    assert (found.is_clear, found.alike) == (True, [3e-3])
    assert "Try learning_rate=0.005. (Yours is 5e-05.)" in found.to_text()


def test_what_noise_does_not_tell_apart_is_said():
    scores = {1e-5: 1.0, 1e-4: 0.50, 1e-3: 0.45, 1e-2: 0.46, 1e-1: math.inf}
    # Paired: noise that all share tells them apart all the same.
    assert LRTest("swan", 1e-4, trials(scores, noise=0.3)).alike == [1e-3]
    found = LRTest("swan", 1e-4, trials(scores))
    noisy = [Trial(1e-2, [1.0] * 6 + [0.36, 0.56, 0.40, 0.52], 10)]
    found = LRTest("swan", 1e-4, [*found.trials[:3], *noisy, found.trials[4]])
    assert found.alike == [1e-3, 1e-2]
    assert "Noise does not tell 0.001 to 0.01 apart." in found.to_text()
    weak = LRTest("swan", 1e-4, [Trial(1e-5, noisy[0].losses, 10), *found.trials[1:3]])
    assert not weak.is_clear
    assert "This is weak: " in weak.to_text()
    assert max(map(len, weak.to_text().splitlines())) <= 80


def test_where_all_diverge_there_is_no_suggestion():
    found = LRTest("swan", 1e-4, trials({1e-5: math.inf, 1e-4: math.inf}))
    assert found.suggestion is None
    assert "No suggestion: every rate diverged." in found.to_text()
    edge = LRTest("swan", 1e-4, trials({1e-5: 1.0, 1e-4: 0.9, 1e-3: math.inf}))
    assert edge.suggestion == 1e-4


def test_the_picture_is_drawn_with_what_diverged(tmp_path):
    for number, scores in enumerate(({1e-5: 1.0, 1e-4: 0.9, 1e-3: math.inf}, {1e-5: math.inf})):
        LRTest("swan", 1e-4, trials(scores)).save_picture(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changed", "count", "updates", "message"),
    [
        ({}, 96, 5, "updates must be >= 6 but is 5"),
        ({}, 16, 14, "needs the batches of 6 updates but the data has 4"),
        ({"fsdp": "full_shard"}, 96, 14, "needs whole tensors, but fsdp"),
    ],
)
def test_what_can_not_be_tested_is_refused_and_nothing_is_left(tmp_path, changed, count, updates, message):
    trainer = Trainer(Noisy(), arguments(tmp_path), train_dataset=rows(count))
    for name, value in changed.items():
        setattr(trainer.args, name, value)
    before = everything(trainer)
    with pytest.raises(OptionError, match=message):
        lr_find(trainer, updates)
    assert everything(trainer) == before


SCRIPT = """
import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments
args, = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
class Square(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    def forward(self, x, labels=None):
        return {"loss": (self.w * x[0]).square().sum()}
trainer = Trainer(Square(), args, train_dataset=[{"x": torch.ones(1)} for _ in range(20)])
if args.max_steps != 7:
    trainer.train()
print("the script went on")
"""


def test_the_command_has_the_functions_default():
    assert cli.lr.UPDATES == lr_test.UPDATES


class Counting(SaITrainer):
    """As GRPO's trainer has it: what a step does hangs on a count of its own."""

    steps_made = 0

    def training_step(self, *args, **kwargs):
        self.steps_made += 1
        return super().training_step(*args, **kwargs) + 100.0 * self.steps_made


def test_every_trial_begins_with_the_trainers_own_numbers(tmp_path):
    trainer = make(tmp_path, Noisy, Counting)
    found = lr_find(trainer, updates=6)
    assert [round(loss, -2) for loss in found.trials[-1].losses] == [100.0, 200.0, 300.0, 400.0, 500.0, 600.0]
    assert "steps_made" not in vars(trainer)


@pytest.mark.parametrize(
    ("flags", "code", "said", "files"),
    [
        ("--updates 8 train.py {}", 0, "Try learning_rate=", ["out/lr_test.png"]),
        ("--picture p.png --updates 6 train.py {}", 0, "Picture: p.png", ["p.png"]),
        ("--updates 5 train.py {}", 2, "hf-sai: updates must be >= 6 but is 5; 14 is the default", []),
        ("train.py {} --max_steps 7", 1, "the script went on\nhf-sai: lr tests where a script calls the train()", []),
    ],
    ids=["found", "picture", "refused", "untrained"],
)
def test_the_command_tests_in_the_place_of_a_scripts_training(processes, tmp_path, flags, code, said, files):
    (tmp_path / "train.py").write_text(SCRIPT)
    options = "--output_dir out --optim sgd_sai --use_cpu --report_to none --per_device_train_batch_size 1"
    found, output = forked(processes, tmp_path, "lr", *flags.format(options).split())
    assert found == code, output
    assert said in output
    assert ("the script went on" in output) == (code == 1)
    written = {str(path.relative_to(tmp_path)) for path in files_below(tmp_path)} - {"train.py", "output.txt"}
    assert sorted(written) == files
