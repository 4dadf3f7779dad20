"""Our section in a card that others wrote: rendered whole, inserted once, nothing else lost."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard

from hf_sai import SWAN, GSNRReport, SGDSaI, param_groups
from hf_sai.hub.card import (
    BEGIN,
    END,
    card_facts,
    insert_section,
    is_generated,
    mark_generated,
    merge_cards,
    name_repository,
    render_section,
    update_card,
)
from hf_sai.report import format_bytes


FIXTURES = Path(__file__).parent / "fixtures" / "cards"
HOST_CARD = """---
library_name: transformers
license: mit
base_model: some-user/some-model
tags:
- generated_from_trainer
- mine
---

# My model

Text of mine.
"""


@pytest.fixture
def report():
    pairs = [
        ("model.layers.0.q.weight", torch.nn.Parameter(torch.zeros(2, 2))),
        ("scale", torch.nn.Parameter(torch.zeros(1))),
        ("late.weight", torch.nn.Parameter(torch.zeros(3))),
    ]
    optimizer = SGDSaI(pairs, lr=0.5, weight_decay=0.0)
    for (_, param), gradient in zip(pairs, ([[3.0, 4.0], [-3.0, -4.0]], [1.0], [0.0] * 3), strict=True):
        param.grad = torch.tensor(gradient)
    optimizer.step()
    report = GSNRReport.from_optimizer(optimizer, {"effective_batch_size": 8})
    report.versions.update(hf_sai="0.0.0")
    return report


def optimizer_of(names_and_shapes, cls=SGDSaI, **options):
    """After one step on gradients that are the same everywhere: rising numbers around one."""
    optimizer = cls([(name, torch.nn.Parameter(torch.zeros(shape))) for name, shape in names_and_shapes], **options)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.linspace(-1.0, 3.0, param.numel()).reshape(param.shape)
    optimizer.step()
    return optimizer


def layers(*names_and_shapes, prefix="model.layers"):
    return [(f"{prefix}.{layer}.{name}", shape) for layer in range(2) for name, shape in names_and_shapes]


def full():
    names = [
        *layers(("self_attn.q_proj.weight", (8, 8)), ("mlp.up_proj.weight", (24, 8))),
        ("lm_head.weight", (32, 8)),
    ]
    return optimizer_of(names, lr=0.01, weight_decay=0.1)


def lora(prefix="base_model.model.model.layers", **options):
    shapes = (("self_attn.q_proj.lora_A.default.weight", (2, 8)), ("self_attn.q_proj.lora_B.default.weight", (8, 2)))
    return optimizer_of(layers(*shapes, prefix=prefix), lr=0.1, weight_decay=0.0, **options)


def swan():
    model = torch.nn.ModuleDict(
        {"table": torch.nn.Embedding(4, 3), "layers": torch.nn.ModuleList([torch.nn.Linear(3, 3) for _ in range(2)])}
    )
    optimizer = SWAN(param_groups(model, "swan", weight_decay=0.1), lr=0.002)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer


LLAMA = {"config.json": '{"architectures": ["LlamaForCausalLM"]}', "tokenizer_config.json": "{}"}
# Kind of card: the host's card, the optimizer, and what stands beside the card.
KINDS = {
    "full": ("full", full, {**LLAMA, "gsnr_report.png": ""}),
    "lora": ("lora", lora, {"adapter_config.json": '{"task_type": "CAUSAL_LM"}', "gsnr_report.png": ""}),
    "sft": ("sft", lambda: lora(normalize="max"), {**LLAMA, "adapter_config.json": '{"task_type": "CAUSAL_LM"}'}),
    "diffusers_lora": ("diffusers_lora", lambda: lora("unet.down_blocks"), {"gsnr_report.png": ""}),
    "swan": ("full", swan, LLAMA),
    "resumed": ("full", full, {**LLAMA, "gsnr_report.png": ""}),
}
RESULT = EvalResult("text-generation", "user/data", "some data", "loss", 0.5, dataset_split="test")


def written(kind, folder):
    """The card of a kind of run, beside what the run wrote."""
    host, build, files = KINDS[kind]
    for name, content in files.items():
        (folder / name).write_text(content)
    path = folder / "README.md"
    content = (FIXTURES / f"{host}.host.md").read_text()
    path.write_text(content)
    report = GSNRReport.from_optimizer(build(), {"effective_batch_size": 8})
    report.versions.clear()
    report.versions.update(hf_sai="0.0.0", torch="2.0.0")
    earlier = ""
    if kind == "resumed":  # the first part of the run was pushed, and then a person wrote into its card
        update_card(path, dataclasses.replace(report, learning_rate=0.5), earlier="")
        earlier = (
            path.read_text().replace("license: mit", "license: apache-2.0").replace("- Loss: 0.1234", "My words.")
        )
        path.write_text(content)
    repo_id = None if kind == "swan" else "user/my-model"
    update_card(path, report, earlier=earlier, repo_id=repo_id, results=[RESULT] if kind == "full" else [])
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_whole_card_equals_the_fixture(kind, tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert written(kind, folder).read_text() == (FIXTURES / f"{kind}.md").read_text()
    assert is_generated((FIXTURES / f"{kind}.md").read_text()) == (kind != "resumed")


def test_a_second_update_changes_nothing(report, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(HOST_CARD)
    update_card(path, report)
    once = path.read_text()
    update_card(path, report)
    assert path.read_text() == once


def test_section_is_replaced_where_it_stands_and_kept_once():
    section = f"{BEGIN}\nnew\n{END}"
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n{BEGIN}\nolder\n{END}\nend"
    assert insert_section(text, section) == f"before\n{section}\nafter\n\nend"
    assert insert_section("only text\n\n\n", section) == f"only text\n\n{section}\n"


def test_a_marker_of_the_user_alone_costs_no_text():
    section = f"{BEGIN}\nours\n{END}"
    once = insert_section(f"{BEGIN}\nMY TEXT", section)
    assert once.startswith(f"{BEGIN}\nMY TEXT")
    assert insert_section(once, section) == once


def test_several_base_models_stay(report, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nbase_model:\n- a/b\n- c/d\n---\n\nText.\n")
    update_card(path, report)
    assert ModelCard.load(path).data.base_model == ["a/b", "c/d"]


def test_backslashes_in_a_section_are_text():
    section = f"{BEGIN}\n\\1 \\g<0>\n{END}"
    assert insert_section(f"before\n{BEGIN}x{END}\n\\2", section) == f"before\n{section}\n\\2"


@pytest.mark.parametrize("base", ["/home/somebody/model", "./model", "demo_output/base/model", "existing"])
def test_local_folders_are_taken_out(report, tmp_path, base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "existing").mkdir()
    path = tmp_path / "README.md"
    path.write_text(
        f"---\nbase_model: {base}\ntags:\n- base_model:adapter:{base}\n- lora\n---\n\n"
        f"A fine-tuned version of [{base}](https://huggingface.co/{base}) on data.\n"
    )
    update_card(path, report)
    card = ModelCard.load(path)
    assert card.data.base_model is None
    assert card.data.tags == ["lora", "hf-sai", "sgd-sai", "arxiv:2412.11768"]
    assert base not in card.text.replace("existing gradient", "")
    assert "A fine-tuned version of a local model on data." in card.text


def test_facts_say_what_is_pending_and_what_fell_back(report):
    facts = card_facts(report)
    assert facts.status_sentence.startswith("Tensors of one element or with a constant gradient, whose scale is sqrt(")
    assert facts.status_sentence.endswith("and did not train: 1.")
    assert ("effective batch size at the measurement", "8") in facts.options
    assert "| `late` | 1 | 3 | - | - | - | pending |" in render_section(facts)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (25_150_000_000, "25.1 GB")]
)
def test_bytes_for_people(count, text):
    assert format_bytes(count) == text


def test_a_form_that_is_filled_in_is_a_persons(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\n---\n\n# Form\n\n[fill in]\n")
    mark_generated(path)
    form = path.read_text()
    assert is_generated(form)
    assert is_generated(form.replace("\n", "\n\n"))
    assert not is_generated(form.replace("[fill in]", "My words"))
    assert not is_generated(form.replace("license: mit", "license: mit\ntags:\n- mine"))
    mark_generated(path)
    assert path.read_text() == form


def test_cards_of_persons_and_hosts_are_merged(report, tmp_path, caplog):
    path = tmp_path / "README.md"
    path.write_text("---\nlibrary_name: peft\n---\n\n# Of the host\n")
    update_card(path, report, earlier="")
    ours = path.read_text()
    theirs = "---\nlicense: mit\ntags:\n- mine\n---\n\n# Mine\n"
    merged = ModelCard(merge_cards(ours, theirs))
    assert merged.text.startswith("\n# Mine")
    assert merged.text.count(BEGIN) == 1
    assert (merged.data.license, merged.data.library_name) == ("mit", "peft")
    assert merged.data.tags == ["mine", "hf-sai", "sgd-sai", "arxiv:2412.11768"]
    assert merge_cards(ours, str(merged)) == str(merged)
    older = ours.replace("# Of the host", "# Older")
    assert merge_cards(ours, ours) == ours
    assert "# Older" in merge_cards(ours, older)
    path.write_text("---\nlibrary_name: peft\n---\n\n# Old\n")
    update_card(path, report, earlier="")
    assert merge_cards(ours, path.read_text()) == ours
    edited = ours.replace("# Of the host", "# Mine, here")
    assert merge_cards(edited, theirs) == edited
    assert "were both edited" in caplog.text


def test_a_repository_is_named_in_our_section_only(report, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\n---\n\nI call it your-name/this-repository.\n")
    update_card(path, report)
    content = name_repository(path.read_text(), "user/run")
    assert content.count("your-name/this-repository") == 1
    assert content.count('"gsnr=user/run"') == 1
