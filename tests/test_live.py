"""What steps is what was asked for, and holds what is trained: in every Trainer, without a callback of ours."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from support.models import tiny_llama, tiny_lora, token_blocks, word_tokenizer
from support.trainers import arguments, trainable
from torch import nn
from transformers import Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

import hf_sai
from hf_sai import OptimizerMismatchError
from hf_sai.live import check_trains


pytestmark = pytest.mark.usefixtures("no_picture")
CHANGED = r"make it after PEFT, model_init, quantisation or new embeddings have changed the model"


def with_adapter(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))


def with_copies(model):
    """The embedding's and the head's trained copies beside an adapter."""
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def resized(model):
    model.resize_token_embeddings(40)
    return model


def with_new_head(model):
    model.lm_head = nn.Linear(16, 32, bias=False)
    return model


def quantised(model):
    """As bitsandbytes has it: another module, whose weight has the name of before and is not trained."""
    for layer in model.model.layers:
        layer.mlp.up_proj = nn.Linear(16, 24, bias=False).requires_grad_(False)
    return model


def another(model):
    return copy.deepcopy(model)


def by_pair(name, model, **options):
    return {"optimizers": (hf_sai.create_optimizer(name, model, lr=0.01), None)}


def by_choice(name, model):
    return {"optimizer_cls_and_kwargs": hf_sai.optimizer_cls_and_kwargs(name, lr=0.01, model=model)}


def nameless(name, model):
    return {"optimizers": (hf_sai.SGDSaI(model.parameters(), lr=0.01), None)}


@pytest.mark.parametrize(
    ("change", "lacks"),
    [
        (with_adapter, "it lacks 28 of the model's 28 trainable tensors (base_model.model.model.layers.0.self_attn"),
        (with_copies, "it lacks 5 of the model's 5 trainable tensors (base_model"),
        (
            with_new_head,
            "lacks 1 of the model's 21 trainable tensors (lm_head.weight), and 1 of its 21 tensors are not",
        ),
        (quantised, "but 2 of its 21 tensors are not in that model (model.layers.0.mlp.up_proj.weight, model.layers."),
        (another, "it lacks 21 of the model's 21 trainable tensors (model.embed_tokens.weight, model.layers.0.self_"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("name", ["sgd_sai", "swan", "sgd_sai_layerwise"])
@pytest.mark.parametrize("route", [by_pair, by_choice, nameless])
def test_an_optimizer_of_the_model_before_it_was_changed_is_an_error(tmp_path, change, lacks, name, route):
    if route is nameless and (change is quantised or name != "sgd_sai"):
        pytest.skip("frozen, and without a name nobody can tell it from a parameter of a loss")
    model = tiny_llama()
    options = route(name, model)
    model = change(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    args = arguments(tmp_path, optim="adamw_torch", max_grad_norm=0)
    trainer = Trainer(model, args, train_dataset=token_blocks(), **options)
    with pytest.raises(OptimizerMismatchError, match=CHANGED) as caught:
        trainer.train()
    assert lacks in str(caught.value)
    assert trainer.state.global_step == 0
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["sgd_sai", "swan"])
def test_an_adapter_or_a_model_that_the_trainer_makes_is_found_too(tmp_path, name):
    model = tiny_llama()
    rows = {"train_dataset": token_blocks()}
    by_init = Trainer(None, arguments(tmp_path), model_init=lambda: tiny_llama(), **by_choice(name, model), **rows)
    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    args = arguments(tmp_path, cls=SFTConfig, bf16=False)
    texts = {"processing_class": word_tokenizer(), "train_dataset": Dataset.from_list([{"text": "w1 w2 w3"}] * 8)}
    by_config = SFTTrainer(model, args=args, peft_config=adapter, **by_choice(name, model), **texts)
    for trainer in (by_init, by_config):
        trainer.args.optim = "adamw_torch"
        with pytest.raises(OptimizerMismatchError, match=CHANGED):
            trainer.train()


def test_every_model_of_a_search_gets_an_optimizer_of_its_own(tmp_path):
    """As hyperparameter_search trains: anew from model_init, by one Trainer."""
    made = []

    def init():
        made.append(tiny_llama(seed=len(made)))
        return made[-1]

    trainer = Trainer(None, arguments(tmp_path, max_steps=2), model_init=init, train_dataset=token_blocks())
    for _ in range(2):
        trainer.train()
        start = tiny_llama(seed=len(made) - 1)
        assert not any(torch.equal(a, b) for a, b in zip(start.parameters(), made[-1].parameters(), strict=True))


# ---- What is right ----


class Heads(nn.Module):
    """Two heads, of which a training may want one, and a frozen one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.frozen = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return {"loss": (self.one(x) + self.two(x) + self.frozen(x)).square().mean()}


class Unfreezes(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            model.frozen.requires_grad_(True)


def train_heads(folder, model, params, callbacks=()):
    args = arguments(folder, optim="adamw_torch", remove_unused_columns=False, max_grad_norm=0)
    options = {"optimizers": (hf_sai.SGDSaI(params, lr=0.01), None), "callbacks": list(callbacks)}
    trainer = Trainer(model, args, train_dataset=[{"x": torch.tensor([1.0, -2.0, 0.5])}] * 48, **options)
    before = copy.deepcopy(model)
    trainer.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    return {name.partition(".")[0] for name in moved}


def test_frozen_parameters_may_be_held_and_unfrozen_later(tmp_path, caplog):
    model = Heads()
    assert train_heads(tmp_path, model, model.parameters(), [Unfreezes()]) == {"one", "two", "frozen"}
    assert "does not train" not in caplog.text


def test_parameters_of_a_loss_may_be_held_too(tmp_path, caplog):
    model, loss = Heads(), nn.Linear(3, 3)
    assert train_heads(tmp_path, model, [*model.named_parameters(), *loss.named_parameters("loss")]) == {"one", "two"}
    assert "does not train" not in caplog.text


def test_a_part_on_purpose_is_a_warning(tmp_path, caplog):
    """Another optimizer may train the rest."""
    model = Heads()
    assert train_heads(tmp_path, model, model.one.parameters()) == {"one"}
    (said,) = [record.getMessage() for record in caplog.records if "does not train" in record.getMessage()]
    assert said.startswith("SGDSaI does not train 2 of the model's 4 trainable tensors (two.weight, two.bias). Where")


def tied():
    model = tiny_llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


@pytest.mark.parametrize(
    "wrap", [torch.compile, nn.DataParallel, lambda model: nn.ModuleDict({"a": model, "b": model})]
)
@pytest.mark.parametrize("build", [tiny_llama, tiny_lora, tied, lambda: with_copies(tiny_llama())])
def test_wrapped_tied_and_copied_parameters_are_the_same(build, wrap, caplog):
    model = build()
    for held in (model, wrap(model)):
        optimizer = hf_sai.create_optimizer("sgd_sai", held)
        for trained in (model, wrap(model)):
            check_trains(optimizer, trained)
    assert not [record for record in caplog.records if record.name.startswith("hf_sai")]


@pytest.mark.parametrize("name", ["sgd_sai", "swan_layerwise"])
def test_a_plain_trainer_that_steps_another_optimizer_than_asked_for_is_an_error(tmp_path, name):
    """As LLaMA-Factory does for use_muon, and accelerate for a configuration with an optimizer."""

    class Muon(Trainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            return self.optimizer

    model = tiny_llama()
    before = trainable(model)
    args = arguments(tmp_path, optim=name, max_grad_norm=0)
    message = f"optim='{name}' asks for .*, but the optimizer that runs is SGD"
    with pytest.raises(OptimizerMismatchError, match=message):
        Muon(model, args, train_dataset=token_blocks()).train()
    assert all(torch.equal(before[key], value) for key, value in trainable(model).items())


def test_optimizers_of_others_are_left_alone(tmp_path):
    model = tiny_llama()
    optimizer = torch.optim.AdamW(tiny_llama().parameters())
    args = arguments(tmp_path, optim="adamw_torch", max_steps=1)
    trainer = Trainer(model, args, train_dataset=token_blocks(), optimizers=(optimizer, None))
    trainer.train()
    assert trainer.state.global_step == 1


def test_what_watches_the_trainings_is_taken_back():
    from transformers.trainer import CallbackHandler

    places = [(Trainer, "train"), (CallbackHandler, "on_train_begin")]
    watched = [getattr(cls, name) for cls, name in places]
    hf_sai.register()
    assert [getattr(cls, name) for cls, name in places] == watched
    hf_sai.unregister()
    try:
        assert [getattr(cls, name) for cls, name in places] == [each.__wrapped__ for each in watched]
    finally:
        hf_sai.register()
    assert [getattr(cls, name).__wrapped__ for cls, name in places] == [each.__wrapped__ for each in watched]


def test_a_loop_that_trains_another_model_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        for optim in ("sgd_sai", "swan", "sgd_sai_layerwise", "swan_layerwise"):
            optimizer = hf_sai.create_optimizer(optim, tiny_llama(), lr=0.01)
            for _ in range(2):
                optimizer.step()
    assert [record.getMessage().split(". ")[0] for record in caplog.records] == [
        f"{cls}.step() finds no gradient in any of its 21 tensors"
        for cls in ("SGDSaI", "SWAN", "SGDSaILayerwise", "SWANLayerwise")
    ]
    caplog.clear()
    model = tiny_llama()
    for optim in ("sgd_sai", "sgd_sai_layerwise"):
        optimizer = hf_sai.create_optimizer(optim, model, lr=0.01)
        model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.step()  # none in a later step is a choice
    assert not caplog.records
