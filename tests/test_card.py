"""Our section in a card that others wrote: rendered whole, inserted once, nothing else lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from hf_sai import SWAN, GSNRReport, SGDSaI, param_groups
from hf_sai.hub.card import BEGIN, END, card_facts, format_bytes, insert_section, render_section, update_card


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


def test_whole_card_equals_the_fixture(report, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(HOST_CARD)
    update_card(path, report)
    assert path.read_text() == (FIXTURES / "transformers_sgd_sai.md").read_text()


def test_whole_card_of_swan_equals_the_fixture(tmp_path):
    model = torch.nn.ModuleDict(
        {"table": torch.nn.Embedding(4, 3), "layers": torch.nn.ModuleList([torch.nn.Linear(3, 3) for _ in range(2)])}
    )
    optimizer = SWAN(param_groups(model, "swan", weight_decay=0.1), lr=0.002)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    report = GSNRReport.from_optimizer(optimizer, {"effective_batch_size": 8})
    report.versions.update(hf_sai="0.0.0")
    path = tmp_path / "README.md"
    path.write_text(HOST_CARD)
    update_card(path, report)
    assert path.read_text() == (FIXTURES / "transformers_swan.md").read_text()


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
    assert section in insert_section(f"{BEGIN}x{END}", section)


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
