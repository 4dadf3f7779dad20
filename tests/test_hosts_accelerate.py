"""examples/hosts/accelerate_loop.py: accelerate's loop with our optimizers, against a plain one and resumed."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.models import VOCABULARY, word_tokenizer
from support.processes import forked
from torch.nn.utils import clip_grad_norm_
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup

import hf_sai
from hf_sai import GSNRReport


EXAMPLES = Path(__file__).parent.parent / "examples" / "hosts"
pytestmark = pytest.mark.usefixtures("no_picture")


@pytest.fixture
def loop(monkeypatch):
    from accelerate.state import AcceleratorState, GradientState

    monkeypatch.syspath_prepend(str(EXAMPLES))
    import accelerate_loop

    yield accelerate_loop
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(loop, folder, *options):
    return loop.main(loop.parser().parse_args(["--cpu", "--output_dir", str(folder), *options]))


def plain(loop, folder, optim, every):
    """Without accelerate, on the data in the order that the other loop saw."""
    from accelerate.utils import set_seed

    set_seed(0)
    loop.dataloader()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=32, max_position_embeddings=16, **sizes))
    optimizer = hf_sai.create_optimizer(optim, model, lr=loop.RATES[optim], weight_decay=0.01)
    scheduler = get_linear_schedule_with_warmup(optimizer, 4, 16 // every)
    return model.train(), optimizer, scheduler


@pytest.mark.parametrize("optim", ["sgd_sai", "swan"])
@pytest.mark.parametrize("every", [1, 2])
def test_each_step_is_that_of_a_plain_loop(tmp_path, loop, monkeypatch, optim, every):
    from accelerate import Accelerator

    seen = []
    monkeypatch.setattr(Accelerator, "backward", lambda self, loss: (loss / every).backward())
    forward = BertForSequenceClassification.forward
    with monkeypatch.context() as patch:
        patch.setattr(
            BertForSequenceClassification,
            "forward",
            lambda self, **batch: (
                seen.append(({k: v.clone() for k, v in batch.items()}, torch.get_rng_state())),
                forward(self, **batch),
            )[1],
        )
        losses = run(
            loop, tmp_path, "--optim", optim, "--num_epochs", "1", "--gradient_accumulation_steps", str(every)
        )
    model, optimizer, scheduler = plain(loop, tmp_path, optim, every)
    for index, ((batch, rng), loss) in enumerate(zip(seen, losses, strict=True)):
        torch.set_rng_state(rng)  # of dropout
        found = model(**batch).loss
        assert found.item() == loss
        (found / every).backward()
        if (index + 1) % every == 0:
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    saved = load_file(tmp_path / "epoch_0" / "model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[name])


@pytest.mark.parametrize("optim", ["sgd_sai", "swan"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_resumed_run_ends_the_same_and_has_a_report(tmp_path, loop, optim, precision):
    options = ("--optim", optim, "--mixed_precision", precision, "--num_epochs", "2")
    losses = run(loop, tmp_path / "whole", *options)
    again = run(loop, tmp_path / "again", *options, "--resume_from_checkpoint", str(tmp_path / "whole" / "epoch_0"))
    assert losses[len(losses) // 2 :] == again
    assert all(map(math.isfinite, losses))
    assert sum(losses[-8:]) < sum(losses[:8])
    ends = [load_file(tmp_path / run / "epoch_1" / "model.safetensors") for run in ("whole", "again")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    report = GSNRReport.load(tmp_path / "whole")
    assert {row.layer for row in report.rows} == {None, 0, 1}
    assert json.loads((tmp_path / "whole" / "gsnr_report.json").read_text())["optimizer"] == optim
    if optim == "swan":
        reasons = {row.name: row.reason for row in report.routes if row.route == "adam" and len(row.shape) == 2}
        assert reasons["classifier.weight"] == "output head"
        assert reasons["bert.embeddings.word_embeddings.weight"] == "embedding"


# ---- accelerate's own loops, unmodified, under the launcher ----

METRIC = """
import datasets
import evaluate

class Glue(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        return {"accuracy": sum(a == b for a, b in zip(predictions, references)) / len(references)}
"""
CONFIGS = "configs:\n- config_name: mrpc\n  data_files:\n" + "".join(
    f"  - split: {split}\n    path: {split}.jsonl\n" for split in ("train", "validation")
)


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    """What these loops take from the Hub, by the names that they have there, which are folders here."""
    root = tmp_path_factory.mktemp("glue")
    for name in ("bert-base-cased", "nyu-mll/glue", "glue"):
        (root / name).mkdir(parents=True)
    (root / "glue" / "glue.py").write_text(METRIC)
    (root / "nyu-mll" / "glue" / "README.md").write_text(f"---\n{CONFIGS}---\n")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 64), ("validation", 32)):
        rows = [
            {
                "sentence1": " ".join(f"w{word}" for word in words),
                "sentence2": "w1",
                "label": words[0] % 2,
                "idx": index,
            }
            for index, words in enumerate(torch.randint(2, 30, (count, 4), generator=generator).tolist())
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (root / "nyu-mll" / "glue" / f"{split}.jsonl").write_text(lines)
    torch.manual_seed(0)
    word_tokenizer().save_pretrained(root / "bert-base-cased")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=16, pad_token_id=VOCABULARY - 1, **sizes)
    BertForSequenceClassification(config).save_pretrained(root / "bert-base-cased")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["sgd_sai", "swan"])
def test_the_loop_that_accelerate_tests_its_checkpoints_with(processes, glue, tmp_path, optim):
    """It is part of accelerate's package: BERT on MRPC, as in `nlp_example.py`. It checks what it loads by itself."""
    own = "accelerate.test_utils.scripts.external_deps.test_checkpointing"
    if "nyu-mll/glue" not in Path(importlib.util.find_spec(own).origin).read_text():
        pytest.skip("an older accelerate, which calls data and metric by one name")
    launch = ("run", "--optim", optim, "-m", own, "--output_dir", str(tmp_path))
    code, output = forked(processes, glue, *launch)
    assert code == 0, output
    saved = torch.load(tmp_path / "epoch_1" / "optimizer.bin", weights_only=True)
    names = {name for group in saved["param_groups"] for name in group["param_names"]}
    assert names == set(load_file(tmp_path / "epoch_1" / "model.safetensors"))
    assert {group["step"] for group in saved["param_groups"]} == {8}
    assert json.loads((tmp_path / "epoch_1" / "gsnr_report.json").read_text())["optimizer"] == optim
    code, output = forked(processes, glue, *launch, "--resume_from_checkpoint", str(tmp_path / "epoch_0"))
    assert code == 0, output
    assert "resumed optimizers's lr: 1e-05" in output


SCRIPTS = {
    "nlp_example.py": ("", 12),
    "complete_nlp_example.py": ("--checkpointing_steps epoch", 12),
    "by_feature/checkpointing.py": ("--checkpointing_steps epoch", 12),
    "by_feature/gradient_accumulation.py": ("--gradient_accumulation_steps 2", 6),
}


@pytest.mark.slow
@pytest.mark.skipif(
    "ACCELERATE_EXAMPLES" not in os.environ, reason="needs a checkout: ACCELERATE_EXAMPLES=.../examples"
)
@pytest.mark.parametrize("optim", ["sgd_sai", "swan"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_of_accelerate_and_its_resumption(processes, glue, tmp_path, script, optim):
    options, steps = SCRIPTS[script]
    launch = [
        "run",
        "--optim",
        optim,
        str(Path(os.environ["ACCELERATE_EXAMPLES"]) / script),
        "--cpu",
        *options.split(),
    ]
    whole, again = tmp_path / "whole", tmp_path / "again"
    saves = "checkpoint" in options
    code, output = forked(processes, glue, *launch, *(["--output_dir", str(whole)] if saves else []))
    assert code == 0, output
    assert f" ran, {steps} steps" in output
    if saves:
        resume = ["--output_dir", str(again), "--resume_from_checkpoint", str(whole / "epoch_0")]
        code, output = forked(processes, glue, *launch, *resume)
        assert code == 0, output
        assert " ran, 8 steps" in output
        ends = [load_file(folder / "epoch_2" / "model.safetensors") for folder in (whole, again)]
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
