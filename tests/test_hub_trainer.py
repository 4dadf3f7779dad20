"""A Trainer's pushes to a loopback Hub: what is there afterwards, and what a broken Hub does to a training."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hub_server import connected, loopback_hub, online
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from support.hub import FOREVER, TOKEN, command_in
from support.models import tiny_llama, tiny_lora, token_blocks, word_tokenizer
from support.trainers import arguments, files_below, trainable
from transformers import AutoModelForCausalLM, Trainer
from trl import SFTConfig, SFTTrainer
from typer.testing import CliRunner

from hf_sai import GSNRReport, SaIConfig, SaITrainer, make_trainer
from hf_sai.cli import app
from hf_sai.hub.card import is_generated, update_card
from hf_sai.hub.push import PushError
from hf_sai.hub.section import BEGIN, END
from hf_sai.upload import UploadError


@pytest.fixture(scope="module")
def hub():
    with pytest.MonkeyPatch.context() as patch, loopback_hub() as hub, connected(hub, patch):
        yield hub


@pytest.fixture(autouse=True)
def _no_fault(request):
    yield
    if "hub" in request.fixturenames:
        request.getfixturevalue("hub").heal()


def trainer_of(folder, model, repo, config=None, **changed):
    settings = {"push_to_hub": True, "hub_model_id": repo, "hub_token": TOKEN, "max_steps": 2, **changed}
    args = arguments(folder, **settings)
    return SaITrainer(model, args, train_dataset=token_blocks(), sai_config=config)


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory):
    """A full run and a LoRA run, each pushed at its end, with the trainers."""
    trainers = {}
    for name, model in (("full", tiny_llama()), ("lora", tiny_lora())):
        trainer = trainer_of(tmp_path_factory.mktemp("runs") / name, model, f"user/{name}", hub_private_repo=True)
        trainer.train()
        trainer.push_to_hub(dataset="some data", tasks="text-generation")
        trainers[name] = trainer
    return trainers


SHARED = [".gitattributes", "README.md", "gsnr_report.json", "gsnr_report.png", "training_args.bin"]


def test_a_push_is_one_commit_with_model_report_picture_and_card(hub, pushed):
    expected = {
        "full": ["config.json", "generation_config.json", "model.safetensors"],
        "lora": ["adapter_config.json", "adapter_model.safetensors"],
    }
    for name, own in expected.items():
        repo = hub.repos[f"user/{name}"]
        assert repo.private
        assert sorted(repo.tree()) == sorted([*SHARED, *own])
        assert list(repo.messages.values()) == ["", "End of training"]
        for file in ("gsnr_report.json", "gsnr_report.png"):
            assert repo.tree()[file] == (Path(pushed[name].args.output_dir) / file).read_bytes()


LOAD = """
import json, sys, torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM
import hf_sai
from support.models import tiny_llama, token_blocks
from support.trainers import arguments
full = AutoModelForCausalLM.from_pretrained("user/full", revision="main")
lora = PeftModel.from_pretrained(tiny_llama(), "user/lora")
weights = {n: p.detach() for m in (full, lora) for n, p in m.named_parameters() if m is full or "lora_" in n}
torch.save(weights, sys.argv[1] + "/weights.pt")
reports = [hf_sai.GSNRReport.from_pretrained(f"user/{name}") for name in ("full", "lora")]
args = arguments(sys.argv[1] + "/out", optim_args="gsnr=user/full", max_steps=1)
trainer = hf_sai.SaITrainer(tiny_llama(3), args, train_dataset=token_blocks())
trainer.train()
print(json.dumps({
    "reports": [report.to_json() for report in reports],
    "cards": [ModelCard.load(f"user/{name}").content for name in ("full", "lora")],
    "given": {row.name: [row.gsnr, row.status] for row in trainer.gsnr_callback.report.tensors},
}))
"""


def test_a_fresh_process_loads_it_all_and_trains_with_the_scales(hub, pushed, tmp_path):
    environment = online(hub, tmp_path / "home", HF_TOKEN=TOKEN)
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), environment.get("PYTHONPATH", "")])
    words = [sys.executable, "-c", LOAD, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    reports = [pushed[name].gsnr_callback.report for name in ("full", "lora")]
    assert found["reports"] == [report.to_json() for report in reports]
    assert [GSNRReport.from_json(text) for text in found["reports"]] == reports
    assert found["cards"] == [hub.repos[f"user/{name}"].tree()["README.md"].decode() for name in ("full", "lora")]
    assert found["given"] == {row.name: [row.gsnr, "given"] for row in reports[0].tensors}
    weights = torch.load(tmp_path / "weights.pt")
    expected = {**trainable(pushed["full"].model), **trainable(pushed["lora"].model)}
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_cards_name_their_repository_and_hold_the_section_once(hub, pushed):
    for name, library in (("full", "transformers"), ("lora", "peft")):
        content = hub.repos[f"user/{name}"].tree()["README.md"].decode()
        card = ModelCard(content)
        assert card.data.library_name == library
        assert card.data.base_model is None
        assert {"hf-sai", "sgd-sai", "arxiv:2412.11768"} <= set(card.data.tags)
        assert content.count(BEGIN) == content.count(END) == 1
        assert f'from_pretrained({"base, " if name == "lora" else ""}"user/{name}")' in content
        assert f'optim_args="gsnr=user/{name}"' in content
        assert is_generated(content)


def test_a_second_push_replaces_what_the_host_wrote_and_nobody_edited(hub, pushed):
    trainer = pushed["lora"]
    first = hub.repos["user/lora"].tree()["README.md"].decode()
    trainer.push_to_hub(dataset="other data")
    second = hub.repos["user/lora"].tree()["README.md"].decode()
    assert "other data" in second
    assert "some data" in first
    assert "some data" not in second
    assert second.count(BEGIN) == 1


@pytest.mark.parametrize("place", ["here", "hub"])
def test_an_edited_card_keeps_the_persons_text(hub, tmp_path, place):
    repo = f"user/edited-{place}"
    trainer = trainer_of(tmp_path, tiny_lora(), repo)
    trainer.train()
    trainer.push_to_hub()
    path = tmp_path / "README.md"
    before = path.read_text()
    edited = before.replace("- lora", "- lora\n- mine").replace("## Intended uses", "My words.\n\n## Intended uses")
    assert "My words." in edited
    if place == "here":
        path.write_text(edited)
    else:
        hub.add(repo, {"README.md": edited.encode()})
    trainer.args.max_steps = 3
    trainer.train()
    trainer.push_to_hub()
    content = hub.repos[repo].tree()["README.md"].decode()
    card = ModelCard(content)
    assert "mine" in card.data.tags
    assert "My words.\n\n## Intended uses" in content
    assert content.count(BEGIN) == content.count(END) == 1
    outside = lambda text: [line for line in text[: text.index(BEGIN)].splitlines() if line.strip()]  # noqa: E731
    assert set(outside(edited)) <= set(outside(content))


def test_an_adapter_over_a_full_model_takes_nothing_away(hub, tmp_path):
    repo = "user/both"
    full = trainer_of(tmp_path / "full", tiny_llama(), repo)
    full.train()
    full.push_to_hub()
    there = dict(hub.repos[repo].tree())
    mine = there["README.md"].decode().replace("## Intended uses", "My words.\n\n## Intended uses")
    hub.add(repo, {"README.md": mine.encode(), "notes.md": b"mine"})
    lora = trainer_of(tmp_path / "lora", tiny_lora(), repo)
    lora.train()
    lora.push_to_hub()
    now = hub.repos[repo].tree()
    assert {name: now[name] for name in ("model.safetensors", "config.json")} == {
        name: there[name] for name in ("model.safetensors", "config.json")
    }
    assert now["notes.md"] == b"mine"
    assert "adapter_model.safetensors" in now
    content = now["README.md"].decode()
    assert "My words." in content
    assert content.count(BEGIN) == 1
    assert "PeftModel.from_pretrained" in content
    assert now["gsnr_report.json"] == (tmp_path / "lora" / "gsnr_report.json").read_bytes()


def test_strategies_of_the_host_carry_the_report(hub, tmp_path):
    trainer = trainer_of(
        tmp_path, tiny_lora(), "user/saves", hub_strategy="checkpoint", save_strategy="steps", save_steps=1
    )
    trainer.args.hub_always_push = True
    trainer.train()
    repo = hub.repos["user/saves"]
    assert [repo.messages[oid] for oid in repo.branches["main"][1:]] == [
        "Training in progress, step 1",
        "Training in progress, step 1, checkpoint",
        "Training in progress, step 2",
        "Training in progress, step 2, checkpoint",
    ]
    for oid in repo.branches["main"][1:]:
        assert {"adapter_model.safetensors", "gsnr_report.json", "gsnr_report.png"} <= set(repo.commits[oid])
    tree = repo.tree()
    assert "last-checkpoint/optimizer.pt" in tree
    assert "last-checkpoint/gsnr_report.json" in tree
    assert not [name for name in tree if "checkpoint-" in name or name == "optimizer.pt"]
    assert tree["gsnr_report.json"] == (tmp_path / "gsnr_report.json").read_bytes()


@pytest.mark.parametrize(
    ("stage", "kind", "timeout"),
    [
        ("create", 401, 30),
        ("create", "slow", 0.5),
        ("commit", 503, 30),
        ("lfs_upload", "reset", 30),
        ("info", 404, 30),
    ],
)
def test_a_broken_hub_costs_no_training(hub, tmp_path, caplog, monkeypatch, stage, kind, timeout):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    repo = f"user/broken-{stage}-{kind}"
    hub.over.clear()
    hub.fail(stage, kind, FOREVER)
    config = SaIConfig(hub_timeout=timeout)
    with caplog.at_level(logging.WARNING):
        saves = {"save_strategy": "steps", "save_steps": 1}
        trainer = trainer_of(tmp_path, tiny_lora(), repo, config, hub_private_repo=True, **saves)
        trainer.train()
        trainer.save_model()
        assert trainer.push_to_hub() is None
    assert trainer.state.global_step == 2
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        assert GSNRReport.load(folder) == trainer.gsnr_callback.report
        assert (folder / "adapter_model.safetensors").is_file()
    assert repo not in hub.repos or list(hub.repos[repo].tree()) == [".gitattributes"]
    hub.heal()
    hub.over.set()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    command = command_in(caplog.text)
    assert command == ["push", str(tmp_path), repo, "--private"]
    told = [line for line in caplog.text.splitlines() if "hf-sai push" in line]
    assert [line for line in told if not line.endswith(" --private")] == []  # the pushes of checkpoints are so too
    assert CliRunner().invoke(app, [*command, "--strict"]).exit_code == 0
    assert {"adapter_model.safetensors", "README.md", "gsnr_report.json"} <= set(hub.repos[repo].tree())
    assert hub.repos[repo].private
    assert TOKEN not in caplog.text


def test_strict_raises_at_the_end_when_all_is_saved(hub, tmp_path):
    hub.fail("commit", 403, FOREVER)
    config = SaIConfig(hub_strict=True)
    trainer = trainer_of(tmp_path, tiny_lora(), "user/strict", config, save_strategy="steps", save_steps=1)
    trainer.train()  # the pushes of its checkpoints fail
    with pytest.raises(PushError, match=r"403 Forbidden.*this pushes it: hf-sai push .* user/strict"):
        trainer.push_to_hub()
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_branch_pull_request_and_future(hub, tmp_path):
    trainer = trainer_of(tmp_path, tiny_lora(), None, push_to_hub=False)
    trainer.train()
    future = trainer.push_to_hub(blocking=False, revision="v2", token=TOKEN)
    commit = future.result(timeout=60)
    repo = hub.repos[f"user/{tmp_path.name}"]
    assert repo.branches["v2"][-1] == commit.oid
    assert list(repo.tree()) == [".gitattributes"]
    assert trainer.push_to_hub(create_pr=True, token=TOKEN).pr_url.endswith("/discussions/1")
    assert "adapter_model.safetensors" in repo.tree("refs/pr/1")


def test_private_of_a_push_goes_before_the_arguments(hub, tmp_path):
    trainer = trainer_of(tmp_path, tiny_lora(), "user/secret", push_to_hub=False, hub_private_repo=False)
    trainer.train()
    assert trainer.push_to_hub(private=True) is not None
    assert hub.repos["user/secret"].private


def test_another_rank_sends_nothing_and_waits_for_nobody(hub, tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, tiny_lora(), "user/rank", push_to_hub=False)
    trainer.train()
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    before = len(hub.requests)
    assert trainer.push_to_hub(token=TOKEN) is None
    assert len(hub.requests) == before
    assert ModelCard.load(tmp_path / "README.md").text.count(BEGIN) == 0  # PEFT's form, as `_save` left it


BROKEN = {
    "bad YAML": b"---\nlicense: mit: x\n---\n# mine\n",
    "a list": b"---\n- a\n---\n# mine\n",
    "Latin-1": b"# caf\xe9\n",
    "old model-index": b"---\nmodel-index:\n- name: x\n  results:\n  - task:\n      type: t\n---\n",
    "5 MB": b"x" * 5_000_000,
}


@pytest.mark.parametrize("make", [tiny_lora, tiny_llama], ids=["lora", "full"])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_card_that_can_not_be_read_costs_no_training(hub, tmp_path, caplog, kind, make):
    """PEFT reads the card of a folder that it saves to, and the host that of the run before it writes its own."""
    (tmp_path / "README.md").write_bytes(BROKEN[kind])
    repo = f"user/card-{kind}-{make.__name__}".replace(" ", "-")
    trainer = trainer_of(tmp_path, make(), repo, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert trainer.push_to_hub() is not None
    assert trainer.state.global_step == 2
    assert (tmp_path / "README.md").read_bytes() == BROKEN[kind]
    assert f"{tmp_path / 'README.md'} is left as it is: a card m" in caplog.text
    weights = "adapter_model.safetensors" if make is tiny_lora else "model.safetensors"
    assert {weights, "gsnr_report.json", "gsnr_report.png"} <= set(hub.repos[repo].tree())
    assert "README.md" not in hub.repos[repo].tree()
    assert not [path for path in files_below(tmp_path) if path.name == "_README.md"]


@pytest.mark.parametrize("name", ["update_card", "generate"])
def test_an_error_on_the_way_brings_a_persons_card_back(tmp_path, monkeypatch, caplog, name):
    """Ours is a warning; the host's is the host's."""
    (tmp_path / "README.md").write_bytes(mine := b"---\r\nlanguage: no\r\n---\r\n# mine\r\n")
    trainer = trainer_of(tmp_path, tiny_llama(), None, push_to_hub=False, max_steps=1)
    trainer.train()

    def fails(path="", *args, **kwargs):
        (tmp_path / "README.md").write_text("half a card")
        raise OSError("a full disk")

    if name == "update_card":
        monkeypatch.setattr("hf_sai.trainer.update_card", fails)
        trainer.create_model_card()
        assert "README.md could not be written; the model is not concerned." in caplog.text
    else:
        monkeypatch.setattr(Trainer, "create_model_card", fails)
        with pytest.raises(OSError, match="a full disk"):
            trainer.create_model_card()
    assert (tmp_path / "README.md").read_bytes() == mine


class _Anew(Trainer):
    """As sentence-transformers' trainer does: every save writes the card anew."""

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        text = f"---\nlibrary_name: st\n---\n\n# A model\n\n- `learning_rate`: {self.args.learning_rate}\n"
        Path(output_dir or self.args.output_dir, "README.md").write_text(text)


def test_a_trainer_that_writes_the_card_with_every_save_keeps_it_up_to_date(tmp_path):
    cls = make_trainer(_Anew)
    for rate in (0.001, 0.002):
        trainer = cls(tiny_llama(), arguments(tmp_path, learning_rate=rate, max_steps=1), train_dataset=token_blocks())
        trainer.train()
        trainer.save_model()
        content = (tmp_path / "README.md").read_text()
        assert f"- `learning_rate`: {rate}\n" in content
        assert f"| learning rate (peak) | {rate:g} |" in content
        assert content.count(BEGIN) == 1
        assert is_generated(content)
    (tmp_path / "README.md").write_text(content.replace("# A model", "# A model of mine"))
    trainer.save_model()
    assert "# A model of mine" in (tmp_path / "README.md").read_text()


def local_model(folder, make=tiny_llama):
    """A model that was saved in a folder and loaded from there, as its configuration says."""
    make().save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert str(folder) == model.config._name_or_path
    return model


@pytest.fixture
def secret(tmp_path):
    return tmp_path / "alice secret" / "base"


def trainers(secret, tmp_path):
    """Trainers of hosts whose cards name their model, their data or their options; each of a local folder."""
    ours = {"learning_rate": 0.05, "max_steps": 1, "bf16": False, "gradient_checkpointing": False}
    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = Dataset.from_list([{"input_ids": list(range(8)), "labels": list(range(8))}] * 8)
    yield "full", lambda out: SaITrainer(local_model(secret), arguments(out, **ours), train_dataset=rows)
    model = lambda: get_peft_model(local_model(secret), adapter)  # noqa: E731
    yield "peft", lambda out: SaITrainer(model(), arguments(out, **ours), train_dataset=rows)
    config = lambda out: arguments(out, SFTConfig, **ours, dataset_text_field="text")  # noqa: E731
    texts = Dataset.from_list([{"text": "a b c"}] * 8)
    sft = make_trainer(SFTTrainer)
    options = {"train_dataset": texts, "processing_class": word_tokenizer()}
    yield "sft", lambda out: sft(local_model(secret), config(out), **options)
    yield "sft of peft", lambda out: sft(local_model(secret), config(out), peft_config=adapter, **options)


@pytest.mark.parametrize("name", ["full", "peft", "sft", "sft of peft"])
def test_no_path_and_nothing_untrue_in_a_hosts_card(tmp_path, secret, name):
    out = tmp_path / "out"
    trainer = dict(trainers(secret, tmp_path))[name](out)
    trainer.train()
    trainer.save_model()
    trainer.gsnr_callback.report.save(secret)
    trainer.args.optim_args = f"gsnr={secret}"
    extra = {"dataset_name": str(secret / "data")} if "sft" in name else {"dataset_tags": str(secret / "data")}
    trainer.create_model_card(**extra)
    texts = [
        path for path in files_below(out) if path.suffix in (".md", ".json") and "adapter_config" not in path.name
    ]
    told = [line for path in texts if "config" not in path.name for line in path.read_text().splitlines()]
    assert [line for line in told if "alice" in line] == []
    content = (out / "README.md").read_text()
    assert "the None dataset" not in content
    assert "Use OptimizerNames" not in content
    assert "a local model" in content or "fine-tuned version of" not in content
    if "sft" not in name:
        assert "- optimizer: sgd_sai of hf_sai with momentum=0.9, eps=1e-08, normalize=none" in content
    assert is_generated(content)
    assert content.count(BEGIN) == 1


def test_data_without_a_name_is_called_so(tmp_path):
    rows = Dataset.from_list([{"input_ids": list(range(8)), "labels": list(range(8))}] * 8)
    args = arguments(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1)
    trainer = SaITrainer(tiny_llama(), args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    trainer.create_model_card(tasks="text-generation")
    content = (tmp_path / "README.md").read_text()
    assert "This model is a fine-tuned version of a local model on an unnamed dataset." in content


def test_no_path_in_a_card_of_diffusers(hub, tmp_path):
    from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card

    base = str(tmp_path / "alice" / "base")
    words = f"These are LoRA adaption weights for {base}. The weights were fine-tuned on the {base}-data dataset."
    card = load_or_create_model_card(
        "user/no-such-model",
        from_training=True,
        license="mit",
        base_model=base,
        model_description=words,
        inference=True,
    )
    populate_model_card(card, tags=["lora", f"base_model:adapter:{base}"]).save(tmp_path / "README.md")
    trainer = trainer_of(tmp_path / "out", tiny_llama(), None, push_to_hub=False, max_steps=1)
    trainer.train()
    update_card(tmp_path / "README.md", trainer.gsnr_callback.report)
    content = (tmp_path / "README.md").read_text()
    assert "alice" not in content
    assert (
        "These are LoRA adaption weights for a local model. The weights were fine-tuned on a local dataset." in content
    )
    assert ModelCard(content).data.tags[0] == "lora"


@pytest.mark.parametrize("token", ["", " ", "two words"])
def test_a_token_that_can_be_none_is_said_before_a_training(hub, tmp_path, token):
    with pytest.raises(UploadError, match="a token must be"):
        trainer_of(tmp_path, tiny_llama(), "user/odd", hub_token=token)


SCRIPT = """
import sys
from support.models import tiny_lora, token_blocks
from support.trainers import arguments
import hf_sai
config = hf_sai.SaIConfig(hub_strict="strict" in sys.argv, hub_timeout=float(sys.argv[2]))
token = sys.argv[3] if len(sys.argv) > 3 and sys.argv[3].startswith("hf_") else None
args = arguments(sys.argv[1], push_to_hub=True, hub_model_id="user/process", hub_token=token, max_steps=2,
                 save_strategy="steps", save_steps=1)
trainer = hf_sai.SaITrainer(tiny_lora(), args, train_dataset=token_blocks(), sai_config=config)
trainer.train()
trainer.push_to_hub()
print("the script went on")
"""


@pytest.mark.parametrize(
    ("stage", "kind", "extra", "code"), [("lfs_upload", "slow", [], 0), ("commit", 403, ["strict"], 1)]
)
def test_a_training_process_ends_with_its_result(tmp_path, stage, kind, extra, code):
    """Its exit too: nothing that still waits for the Hub keeps Python from ending."""
    out = tmp_path / "out"
    with loopback_hub() as hub:
        hub.seconds_slow = FOREVER
        hub.fail(stage, kind, FOREVER)
        environment = online(hub, tmp_path / "home", HF_TOKEN=TOKEN)
        environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), environment.get("PYTHONPATH", "")])
        words = [sys.executable, "-c", SCRIPT, str(out), "3", *extra, *([TOKEN] if not extra else [])]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False, timeout=250)
        said = done.stdout + done.stderr
        assert done.returncode == code, said[-3000:]
        assert ("the script went on" in said) == (code == 0)
        assert command_in(said) == ["push", str(out), "user/process"]
        assert (out / "adapter_model.safetensors").is_file()
        assert list(hub.repos["user/process"].tree()) == [".gitattributes"]
    assert TOKEN not in said
    assert TOKEN.encode() not in hub.recorded()
    assert [path for path in files_below(tmp_path) if TOKEN.encode() in path.read_bytes()] == []
