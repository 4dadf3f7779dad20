"""The functions for hand-written loops, and the handler's refusals."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from support.models import tiny_llama, tiny_lora
from support.trainers import arguments
from transformers import Trainer

import hf_sai
from hf_sai.live import check_sharded, name_parameters


def test_create_optimizer_for_a_model_names_and_spares_norms():
    model = tiny_llama()
    optimizer = hf_sai.create_optimizer("sgd_sai", model, lr=0.3, normalize="max")
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0.0]
    assert [g["lr"] for g in optimizer.param_groups] == [0.3, 0.3]
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert all(("norm" in name) == (name in optimizer.param_groups[1]["param_names"]) for name in names)


def test_create_optimizer_keeps_the_groups_of_others():
    first, second = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    groups = [{"params": [first], "lr": 1e-4, "weight_decay": 0.1}, {"params": [second]}]
    optimizer = hf_sai.create_optimizer("sgd_sai", groups)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(1e-4, 0.1), (1e-2, 1e-2)]
    generator = (p for p in [first, second])
    assert len(hf_sai.create_optimizer("sgd_sai", generator, lr=1.0, weight_decay=0.0).param_groups[0]["params"]) == 2


def test_create_optimizer_refuses_what_it_does_not_know():
    with pytest.raises(hf_sai.OptionError, match="'adam' is not an optimizer of hf_sai"):
        hf_sai.create_optimizer("adam", tiny_llama())
    with pytest.raises(hf_sai.OptionError, match="betas is not an option of sgd_sai"):
        hf_sai.create_optimizer("sgd_sai", tiny_llama(), betas=(0.9, 0.99))


def test_param_groups_hold_each_trained_tensor_once():
    model = tiny_lora()
    pairs = [pair for group in hf_sai.param_groups(model, "sgd_sai", 0.1) for pair in group["params"]]
    assert {name for name, _ in pairs} == {name for name, p in model.named_parameters() if p.requires_grad}
    assert len({id(p) for _, p in pairs}) == len(pairs) == 28


def test_tied_weights_stand_once():
    model = tiny_llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    optimizer = hf_sai.create_optimizer("sgd_sai", model)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert "lm_head.weight" not in names
    assert names.count("model.embed_tokens.weight") == 1


def test_assert_optimizer_looks_through_accelerate():
    model = tiny_llama()
    wrapped = Accelerator(cpu=True).prepare(hf_sai.create_optimizer("sgd_sai", model))
    assert type(wrapped).__name__ == "AcceleratedOptimizer"
    hf_sai.assert_optimizer(wrapped, "sgd_sai")
    with pytest.raises(hf_sai.OptimizerMismatchError, match="asks for SGDSaI, but the optimizer that runs is AdamW"):
        hf_sai.assert_optimizer(Accelerator(cpu=True).prepare(torch.optim.AdamW(model.parameters())), "sgd_sai")


@pytest.mark.parametrize("optim", ["sgd_sai", "swan"])
def test_modes_that_flatten_are_refused_by_name(tmp_path, optim, monkeypatch):
    model, args = tiny_llama(), arguments(tmp_path, optim=optim)

    def choose(**changed):
        with monkeypatch.context() as patch:
            for name, value in changed.items():
                patch.setattr(args, name, value, raising=False)
            return Trainer.get_optimizer_cls_and_kwargs(args, model)

    for changed, mode in (
        ({"fsdp": True, "fsdp_plugin_args": {"fsdp_version": 1}}, "fsdp version 1"),
        ({"fsdp": "full_shard", "fsdp_config": {}}, "fsdp version 1"),  # a host that has no version yet
    ):
        with pytest.raises(hf_sai.OptionError, match=f"optim='{optim}' needs whole tensors, but {mode} is") as caught:
            choose(**changed)
        for line in ('fsdp="full_shard" and fsdp_config={"version": 2}', "fsdp_version: 2 under fsdp_config:"):
            assert line in str(caught.value)
    choose(fsdp=True, fsdp_plugin_args={"fsdp_version": 2})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(hf_sai.OptionError, match="but fsdp version 1 is set"):
        choose()
    monkeypatch.setenv("FSDP_VERSION", "2")
    choose()


def test_fsdp_that_the_host_did_not_turn_on_is_an_error_and_not_a_training_of_copies():
    args = SimpleNamespace(world_size=2, fsdp=True, optim="sgd_sai", learning_rate=0.1)
    plain = hf_sai.create_optimizer("sgd_sai", tiny_llama())
    with pytest.raises(hf_sai.OptionError, match="fsdp is set for 2 processes, but no parameter is sharded"):
        check_sharded(plain, args)
    check_sharded(plain, SimpleNamespace(world_size=1, fsdp=True))
    check_sharded(plain, SimpleNamespace(world_size=2, fsdp=None))


def test_handler_gives_typed_options_and_named_groups(tmp_path):
    args = arguments(tmp_path, optim_args="momentum=0.5,normalize=max", weight_decay=0.2)
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, tiny_llama())
    groups = kwargs.pop("params")
    assert (cls, kwargs) == (
        hf_sai.SGDSaI,
        {"lr": 0.05, "weight_decay": 0.2, "momentum": 0.5, "normalize": "max"},
    )
    assert [group["weight_decay"] for group in groups] == [0.2, 0.0]
    assert groups[0]["params"][0][0] == "model.embed_tokens.weight"


def test_a_choice_of_modules_that_would_change_nothing_is_an_error(tmp_path):
    trainer = Trainer(tiny_llama(), arguments(tmp_path, optim_target_modules="all-linear"))
    with pytest.raises(hf_sai.OptionError, match="target_modules can't be set for sgd_sai"):
        trainer.create_optimizer()


def test_the_plain_policy_asks_for_nothing_and_needs_no_model():
    params = [torch.nn.Parameter(torch.zeros(2, 2))]
    optimizer = hf_sai.create_optimizer("sgd_sai", params, lora_policy="plain")
    assert optimizer.param_groups[0]["params"] == params
    with pytest.raises(hf_sai.OptionError, match="need the modules"):
        hf_sai.create_optimizer("sgd_sai", params, lora_policy="paired")


def test_names_are_given_by_identity_and_not_overwritten():
    model = tiny_llama()
    optimizer = hf_sai.SGDSaI(model.parameters())
    name_parameters(optimizer, model)
    assert optimizer.gsnr_statistics()[0].name == "model.embed_tokens.weight"
    name_parameters(optimizer, torch.nn.Linear(1, 1))
    assert optimizer.gsnr_statistics()[0].name == "model.embed_tokens.weight"


class OwnGroups(Trainer):
    """As sentence-transformers (`learning_rate_mapping`) and ms-swift (`vit_lr`) build theirs."""

    way = "beside"

    def create_optimizer(self, model=None):
        groups = [
            {"params": [p for n, p in self.model.named_parameters() if ("embed" in n) == part], "lr": rate}
            for part, rate in ((True, 0.02), (False, self.args.learning_rate))
        ]
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(self.args, self.model)
        if self.way == "taken out":
            inside = set(groups[0]["params"])
            base = kwargs.pop("params", [{"params": groups[1]["params"]}])
            base = [{**group, "params": [p for p in group["params"] if p not in inside]} for group in base]
            groups = [groups[0], *base]
        self.optimizer = cls(groups, **kwargs)
        return self.optimizer


SETTINGS = [
    ("beside", "vit_lr", 1e-4),
    ("beside", "aligner_lr", 1e-4),
    ("beside", "optimizer", "multimodal"),
    ("taken out", "learning_rate_mapping", {"embed": 0.02}),
]


@pytest.mark.parametrize(("way", "name", "value"), SETTINGS)
def test_rates_for_parts_of_a_model_are_the_hosts(tmp_path, way, name, value):
    args = arguments(tmp_path, learning_rate=0.01)
    setattr(args, name, value)
    trainer = OwnGroups(tiny_llama(), args)
    trainer.way = way
    rates = {}
    for group in trainer.create_optimizer().param_groups:
        rates |= dict.fromkeys(group["params"], group["lr"])
    expected = {p: 0.02 if "embed" in n else 0.01 for n, p in trainer.model.named_parameters()}
    assert rates == expected

    args = arguments(tmp_path, optim="swan")
    setattr(args, name, value)
    with pytest.raises(hf_sai.OptionError, match=f"but the trainer's {name} makes groups without them; leave out"):
        OwnGroups(tiny_llama(), args).create_optimizer()


@pytest.mark.parametrize("optim", ["sgd_sai", "swan", "sgd_sai_layerwise", "swan_layerwise"])
def test_groups_of_a_host_that_nobody_knows_are_refused_in_words(tmp_path, optim):
    trainer = OwnGroups(tiny_llama(), arguments(tmp_path, optim=optim, max_grad_norm=0))
    with pytest.raises(ValueError, match="needs one list of groups but got two: a host has made groups of its own"):
        trainer.create_optimizer()
