"""`write_report`: a plain loop, accelerate's and a wrapper like Lightning's get what a Trainer's run gets."""

from __future__ import annotations

import datetime
import math
import subprocess
import sys
import types

import pytest
import torch
from accelerate import Accelerator
from huggingface_hub import ModelCard
from support.models import tiny_llama, tiny_lora
from torch import nn

import hf_sai
from hf_sai import GSNRReport


pytestmark = pytest.mark.usefixtures("no_picture")
BEGIN = "<!-- hf-sai:begin -->"


def train(model, optimizer, accelerator=None, steps=2):
    """Norm and deviation of the first gradients, by name."""
    seen = {}
    for _ in range(steps):
        loss = model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss
        accelerator.backward(loss) if accelerator else loss.backward()
        for name, param in model.named_parameters():
            if param.grad is not None:
                grad = param.grad.double()
                seen.setdefault(name, (grad.norm().item(), grad.std().item(), grad.numel()))
        optimizer.step()
        optimizer.zero_grad()
    return seen


def assert_report_of(report, seen):
    """By definition, from the gradients that were seen."""
    assert {row.name for row in report.tensors} == set(seen)
    for row in report.tensors:
        norm, deviation, numel = seen[row.name]
        assert row.numel == numel
        if row.status == "measured" and row.step == 1 and numel > 1:
            assert row.gsnr == pytest.approx(max(norm / (deviation + 1e-8), math.sqrt(numel - 1)), rel=1e-5)


def test_a_plain_loop_gets_report_and_a_card_of_its_own(tmp_path):
    model = tiny_llama()
    optimizer = hf_sai.create_optimizer("sgd_sai", model, lr=0.01, momentum=0.8)
    seen = train(model, optimizer)
    model.save_pretrained(tmp_path / "out")
    given = hf_sai.write_report(optimizer, tmp_path / "out", facts={"effective_batch_size": 1})
    report = GSNRReport.load(tmp_path / "out")
    assert report == given
    assert_report_of(report, seen)
    assert datetime.date.fromisoformat(report.run.pop("date"))
    assert report.run == {"effective_batch_size": 1, "world_size": 1, "measurements": optimizer.measurements}
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert {"hf-sai", "sgd-sai", "arxiv:2412.11768"} <= set(card.data.tags)
    assert card.text.count(BEGIN) == 1
    assert card.text.startswith("# out")
    assert "momentum" in card.text
    assert str(tmp_path) not in card.content
    hf_sai.write_report(optimizer, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text().count(BEGIN) == 1


def test_through_accelerate_a_persons_card_keeps_its_text(tmp_path):
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(tiny_lora(), None)
    optimizer = accelerator.prepare(hf_sai.create_optimizer("swan", model, lr=1e-3))
    train(model, optimizer, accelerator)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n\nMy own words.\n")
    report = hf_sai.write_report(optimizer, tmp_path)
    assert {row.name for row in report.routes} == {n for n, p in model.named_parameters() if p.requires_grad}
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nlicense: mit\n")
    assert "# Mine\n\nMy own words.\n" in text
    assert text.count(BEGIN) == 1
    assert "swan" in text


def test_names_come_from_the_model_and_through_a_wrapper(tmp_path):
    """Lightning's holds the optimizer as `.optimizer`."""
    model = tiny_llama()
    optimizer = hf_sai.SGDSaI(model.parameters(), lr=0.01)
    seen = train(model, optimizer)
    assert_report_of(hf_sai.write_report(types.SimpleNamespace(optimizer=optimizer), tmp_path, model=model), seen)


def test_an_optimizer_of_others_is_refused_and_nothing_written(tmp_path):
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="SGD"):
        hf_sai.write_report(torch.optim.SGD(model.parameters(), lr=0.1), tmp_path / "out", model=model)
    assert not (tmp_path / "out").exists()


def test_of_two_processes_the_first_writes(tmp_path):
    code = """
import sys, torch, torch.distributed as dist, hf_sai
from pathlib import Path
rank, root = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=2)
model = torch.nn.Linear(3, 3)
optimizer = hf_sai.create_optimizer("sgd_sai", model, lr=0.1)
model(torch.arange(3.0)).sum().backward()
optimizer.step()
assert hf_sai.write_report(optimizer, root / f"rank{rank}").run["world_size"] == 2
dist.barrier()
"""
    ranks = [subprocess.Popen([sys.executable, "-c", code, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [each.wait(200) for each in ranks] == [0, 0]
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"rank0"}
