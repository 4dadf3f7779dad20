"""SWAN in the real Trainer, SFTTrainer and PEFT: routes, settings of the host, report, card, resume, layer-wise."""

from __future__ import annotations

import logging

import pytest
import torch
from huggingface_hub import ModelCard
from support.models import tiny_llama, tiny_lora, token_blocks
from support.trainers import StopAt, arguments, trainable
from transformers import Trainer

import hf_sai
from hf_sai import SWAN, GSNRReport, OptionError, SaITrainer, SWANLayerwise
from hf_sai.live import unwrap_optimizer


def swan_arguments(folder, **changed):
    return arguments(folder, **{"optim": "swan", "learning_rate": 2e-3, **changed})


def routes_of(trainer):
    return {row.name: row.route for row in unwrap_optimizer(trainer.optimizer).routes()}


def test_trainer_routes_reports_and_puts_it_into_the_card(tmp_path):
    trainer = SaITrainer(tiny_llama(), swan_arguments(tmp_path, weight_decay=0.1), train_dataset=token_blocks())
    trainer.train()
    live = unwrap_optimizer(trainer.optimizer)
    assert type(live) is SWAN
    assert [(group["kind"], group["weight_decay"]) for group in live.param_groups] == [
        ("swan", 0.1), ("adam", 0.1), ("adam", 0.0)
    ]  # fmt: skip
    assert sum(route == "matrix" for route in routes_of(trainer).values()) == 14
    report = GSNRReport.load(tmp_path)
    assert {row.name: row.route for row in report.routes} == routes_of(trainer)
    assert report.run["effective_batch_size"] == 4
    assert any("swan/whitened" in entry for entry in trainer.state.log_history)
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert {"hf-sai", "swan", "arxiv:2412.13148"} <= set(card.data.tags)
    assert "| `self_attn.q_proj` | 2 | 16x16 | matrix | linear layer |" in card.text


def test_settings_of_the_host_for_adam_hold_and_optim_args_come_first(tmp_path):
    settings = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "max_steps": 1}
    trainer = SaITrainer(tiny_llama(), swan_arguments(tmp_path, **settings), train_dataset=token_blocks())
    group = trainer.create_optimizer().param_groups[0]
    assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)
    settings["optim_args"] = "betas=0.7/0.9,scale=5,whitening=newton_schulz"
    trainer = SaITrainer(tiny_llama(), swan_arguments(tmp_path, **settings), train_dataset=token_blocks())
    group = trainer.create_optimizer().param_groups[0]
    assert (group["betas"], group["scale"], group["whitening"]) == ((0.7, 0.9), 5.0, "newton_schulz")


@pytest.mark.parametrize(
    ("target", "whitened"),
    [
        ("all-linear", 14),
        (["q_proj", "mlp"], 2 + 6),
        (r"model\.layers\.0\..*", 7),
        (["model.layers.1.self_attn.v_proj"], 1),
    ],
)
def test_target_modules_have_the_hosts_syntax(tmp_path, target, whitened):
    args = swan_arguments(tmp_path, optim_target_modules=target)
    trainer = SaITrainer(tiny_llama(), args, train_dataset=token_blocks())
    trainer.create_optimizer()
    assert sum(route != "adam" for route in routes_of(trainer).values()) == whitened


def test_target_modules_that_match_nothing_are_an_error(tmp_path):
    args = swan_arguments(tmp_path, optim_target_modules=["no_such_layer"])
    trainer = SaITrainer(tiny_llama(), args, train_dataset=token_blocks())
    with pytest.raises(ValueError, match=r"SWAN needs at least one matrix, but all 21 .* not in target_modules"):
        trainer.train()


@pytest.mark.parametrize(("policy", "whitened"), [("b_only", {"lora_B"}), ("both", {"lora_A", "lora_B"})])
def test_lora_trains_by_policy_and_both_factors_move(tmp_path, policy, whitened):
    model = tiny_lora()
    before = trainable(model)
    args = swan_arguments(tmp_path, optim_args=f"lora_policy={policy}")
    trainer = SaITrainer(model, args, train_dataset=token_blocks())
    trainer.train()
    after = trainable(model)
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    found = {name.split(".")[-3] for name, route in routes_of(trainer).items() if route != "adam"}
    assert found == whitened


def test_a_policy_that_leaves_nothing_names_the_remedy(tmp_path):
    args = swan_arguments(tmp_path, optim_args="lora_policy=adam")
    trainer = SaITrainer(tiny_lora(), args, train_dataset=token_blocks())
    with pytest.raises(ValueError, match="widen target_modules or lora_policy"):
        trainer.train()


@pytest.mark.parametrize("optim_args", [None, "momentum=0.9"])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, optim_args):
    def run(folder, stop=None, resume=None):
        args = swan_arguments(folder, optim_args=optim_args, save_strategy="steps", save_steps=3)
        callbacks = [StopAt(stop)] if stop else []
        trainer = SaITrainer(tiny_llama(), args, train_dataset=token_blocks(), callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)
        return trainable(trainer.model)

    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", stop=3)
    resumed = run(tmp_path / "cut", resume=str(tmp_path / "cut" / "checkpoint-3"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_layerwise_equals_the_ordinary_path(tmp_path):
    results = []
    for name in ("swan", "swan_layerwise"):
        args = swan_arguments(tmp_path / name, optim=name, max_grad_norm=0.0, optim_args="whitening_dtype=float32")
        trainer = SaITrainer(tiny_llama(), args, train_dataset=token_blocks())
        trainer.train()
        results.append(trainable(trainer.model))
        assert type(unwrap_optimizer(trainer.optimizer)) is (SWAN if name == "swan" else SWANLayerwise)
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_grad_norm": 1.0}, "needs max_grad_norm=0, but it is 1.0; set it so, or use optim='swan'"),
        (
            {"max_grad_norm": 0, "gradient_accumulation_steps": 2},
            "needs gradient_accumulation_steps=1, but it is 2; set it so, or use optim='swan'",
        ),
    ],
)
def test_layerwise_refuses_what_needs_all_gradients(tmp_path, changed, message):
    args = swan_arguments(tmp_path, optim="swan_layerwise", **changed)
    trainer = SaITrainer(tiny_llama(), args, train_dataset=token_blocks())
    with pytest.raises(OptionError, match=message):
        trainer.train()


def test_a_learning_rate_in_adams_terms_needs_no_warning(tmp_path, caplog):
    args = swan_arguments(tmp_path, learning_rate=5e-5, max_steps=1)
    with caplog.at_level(logging.WARNING, logger="hf_sai"):
        SaITrainer(tiny_llama(), args, train_dataset=token_blocks()).train()
    assert [record.getMessage() for record in caplog.records] == []


def test_route_without_patches_needs_the_model(tmp_path):
    model = tiny_llama()
    with pytest.raises(OptionError, match="swan is routed by the model's modules, but this route was given no model"):
        hf_sai.optimizer_cls_and_kwargs("swan", lr=1e-3)
    pair = hf_sai.optimizer_cls_and_kwargs("swan", lr=1e-3, weight_decay=0.1, model=model, target_modules=["mlp"])
    args = swan_arguments(tmp_path, optim="adamw_torch")
    trainer = Trainer(model, args, train_dataset=token_blocks(), optimizer_cls_and_kwargs=pair)
    trainer.train()
    assert sum(route != "adam" for route in routes_of(trainer).values()) == 6


def test_options_about_modules_are_refused_where_there_are_none():
    params = list(tiny_llama().parameters())
    optimizer = hf_sai.create_optimizer("swan", params, lr=1e-3)
    assert optimizer.routes()[0].reason == "by shape: the module is not known"
    with pytest.raises(OptionError, match="split_qkv of swan need the modules, but only parameters were given"):
        hf_sai.create_optimizer("swan", params, split_qkv=True)
    with pytest.raises(OptionError, match="target_modules can't be set for sgd_sai, which takes all tensors alike"):
        hf_sai.param_groups(tiny_llama(), "sgd_sai", target_modules="all-linear")


def test_summary_is_logged_in_one_line(caplog):
    with caplog.at_level(logging.INFO, logger="hf_sai"):
        hf_sai.create_optimizer("swan", tiny_llama())
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "swan: 14 tensors (0.00435 M elements) whitened, 7 to Adam: 5 not a matrix, 1 embedding, 1 output head"
    ]


def test_sft_trainer_with_an_adapter(tmp_path):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    args = swan_arguments(tmp_path, cls=SFTConfig, bf16=False, max_length=None, packing=False)
    rows = [{"input_ids": row["input_ids"].tolist()} for row in token_blocks()]
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    from support.models import word_tokenizer

    trainer = hf_sai.make_trainer(SFTTrainer)(
        tiny_llama(),
        args,
        train_dataset=Dataset.from_list(rows),
        peft_config=config,
        processing_class=word_tokenizer(),
    )
    trainer.train()
    assert {row.reason for row in GSNRReport.load(tmp_path).routes if row.route == "matrix, transposed"} == {"LoRA B"}
