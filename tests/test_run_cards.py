"""
Whole cards, one per mode, as real runs write them: our optimizers under the Trainer, and in a script of diffusers.

`pytest tests/test_run_cards.py tests/test_card.py --write-cards` writes the fixtures anew.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from support.models import tiny_llama, tiny_lora, token_blocks
from support.trainers import arguments

from hf_sai import SaITrainer, create_optimizer
from hf_sai.hub.card import is_generated
from hf_sai.hub.section import SECTION
from hf_sai.script_report import ScriptReport


FIXTURES = Path(__file__).parent / "fixtures" / "run_cards"
HOST = "5.24"  # of transformers; the cards of other versions are compared in our section, and but for its numbers


def lora_beside_a_matrix():
    """So that there is a matrix where no factor of LoRA is whitened."""
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["down_proj"], task_type="CAUSAL_LM")
    return get_peft_model(tiny_llama(), config)


# Mode: the model, and what its arguments have besides.
MODES = {
    "plain": (tiny_llama, {"optim": "sgd_sai", "weight_decay": 0.1}),
    "plain_lora": (tiny_lora, {"optim": "sgd_sai", "learning_rate": 0.1, "optim_args": "normalize=max,momentum=0.8"}),
    "paired": (tiny_lora, {"optim": "sgd_sai", "learning_rate": 0.005, "optim_args": "lora_policy=paired"}),
    "swan_both": (tiny_lora, {"optim": "swan", "learning_rate": 0.001, "optim_args": "lora_whitening=both"}),
    "swan_b_only": (tiny_lora, {"optim": "swan", "learning_rate": 0.001, "optim_args": "betas=0.9/0.95,ns_steps=7"}),
    "swan_adam": (
        lora_beside_a_matrix,
        {"optim": "swan", "learning_rate": 0.001, "optim_args": "lora_whitening=adam,whitening=svd"},
    ),
    "swan_targets": (
        tiny_llama,
        {"optim": "swan", "learning_rate": 0.001, "weight_decay": 0.1, "optim_target_modules": ["q_proj", "v_proj"]},
    ),
    "layerwise": (tiny_llama, {"optim": "sgd_sai_layerwise", "max_grad_norm": 0.0}),
}


def card_of_a_run(mode, folder):
    """As `trainer.push_to_hub` would take it along."""
    model, changed = MODES[mode]
    args = arguments(folder, **{"max_steps": 3, "hub_model_id": "user/run", **changed})
    trainer = SaITrainer(model(), args, train_dataset=token_blocks(16))
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="run")
    return folder / "README.md"


def card_of_a_script(folder):
    """LoRA of a denoiser, in a loop of the script's own, which writes a card of diffusers at its end."""
    from diffusers import UNet2DConditionModel
    from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card

    unet = UNet2DConditionModel(
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
        sample_size=4,
    )
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    optimizer = create_optimizer("sgd_sai", unet, lr=0.1, lora_policy="paired")
    report = ScriptReport()
    for _ in range(3):
        noise = torch.randn(2, 4, 4, 4)
        unet(noise, torch.tensor([3, 7]), torch.randn(2, 5, 8)).sample.sub(noise).square().mean().backward()
        optimizer.step()
        report.read(optimizer)
        optimizer.zero_grad()
    card = load_or_create_model_card(
        repo_id_or_path="user/run",
        from_training=True,
        license="mit",
        base_model="some/diffusion-model",
        model_description="# LoRA of a test",
        inference=True,
    )
    populate_model_card(card, tags=["text-to-image", "diffusers", "lora"]).save(folder / "README.md")
    report.write(folder)
    return folder / "README.md"


def masked(text):
    """Without versions and digest, which are another elsewhere."""
    text = re.sub(r"^(python \d.*)$", "VERSIONS", text, flags=re.MULTILINE)
    text = re.sub(r"^(- \w[\w ]*:?) \d+\.\d+\.\d+\S*$", r"\1 VERSION", text, flags=re.MULTILINE)
    return re.sub(r"generated [0-9a-f]{16}", "generated DIGEST", text)


def same(found, expected):
    """Whether texts are the same, with numbers that may differ by 2%: another processor rounds otherwise."""
    number = re.compile(r"(\d+\.\d+(?:e[+-]?\d+)?|\d+e[+-]?\d+)")
    words, others = number.split(found), number.split(expected)
    assert words[::2] == others[::2]
    assert [float(word) for word in words[1::2]] == pytest.approx([float(word) for word in others[1::2]], rel=0.02)


@pytest.mark.parametrize("mode", [*MODES, "diffusers"])
def test_the_card_of_a_run_is_the_fixture(mode, tmp_path, no_picture, write_cards):
    folder = tmp_path / "run"
    folder.mkdir()
    path = card_of_a_script(folder) if mode == "diffusers" else card_of_a_run(mode, folder)
    text = path.read_text()
    fixture = FIXTURES / f"{mode}.md"
    if write_cards:
        fixture.write_text(masked(text))
    found, expected = masked(text), fixture.read_text()
    assert "OptimizerNames" not in text
    assert "None dataset" not in text
    assert str(tmp_path) not in text
    assert is_generated(text)
    assert "hf-sai" in ModelCard(text).data.tags
    if not transformers.__version__.startswith(HOST):
        found, expected = (re.sub(r"\d[\d.,]*(e[+-]\d+)?", "N", SECTION.search(each)[0]) for each in (found, expected))
    same(found, expected)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "swan_targets"])
def test_the_cards_own_line_repeats_the_run(mode, tmp_path):
    """What the fixture tells to type gives groups with the options that its run had."""
    text = (FIXTURES / f"{mode}.md").read_text()
    (line,) = re.findall(r"^args = (TrainingArguments\(.*\))$", text, flags=re.MULTILINE)
    # Its scales would come from the Hub.
    line = re.sub(r',gsnr=user/run"|, optim_args="gsnr=user/run"', lambda found: '"' * (found[0][1] == "g"), line)
    again = eval(line, {"TrainingArguments": lambda out, **given: arguments(tmp_path / out, **given)})
    model, changed = MODES[mode]
    first = arguments(tmp_path / "first", **changed)
    for name in ("optim", "learning_rate", "weight_decay", "max_grad_norm"):
        assert getattr(again, name) == getattr(first, name)
    groups = [
        SaITrainer(model(), each, train_dataset=token_blocks(4)).create_optimizer().param_groups
        for each in (again, first)
    ]
    plain = [
        [{key: value for key, value in group.items() if key != "params"} for group in optimizer]
        for optimizer in groups
    ]
    assert plain[0] == plain[1]
