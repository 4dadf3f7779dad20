"""The example scripts themselves, with few steps."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from support.models import tiny_llama
from transformers.utils import is_torchvision_available

from hf_sai import GSNRReport


EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def examples(monkeypatch, tmp_path):
    """The examples' folder on the path, and a folder of its own to write to."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_demo_prints_its_tables_and_writes_what_it_names(examples, monkeypatch, capsys, caplog):
    import demo

    monkeypatch.setattr(demo, "PRETRAIN_STEPS", 3)
    monkeypatch.setattr(demo, "FINETUNE_STEPS", 4)
    monkeypatch.setattr(demo, "LOG_EVERY", 1)
    demo.main()
    shown = capsys.readouterr().out.partition("=" * 80)[2]
    row = r"^  (\S.*?) +lr ([\d.]+) +([\d.]+) -> ([\d.]+) +([\d,]+) +(\d+)% +\d+(?:  ([\d.]+) (higher|lower))?$"
    rows = re.findall(row, shown, re.M)
    assert [(found[0], float(found[1]), int(found[5])) for found in rows] == [
        ("AdamW", 0.001, 100),
        ("SWAN", 0.001, 8),
        ("SGD-SaI", 0.01, 50),
        ("AdamW", 0.01, 100),
        ("SWAN", 0.003, 46),
        ("SGD-SaI, paired", 0.01, 50),
    ]
    assert len({found[2] for found in rows[3:]}) == 1  # all adapters start from the same model
    for found, adamw in zip(rows, [rows[0]] * 3 + [rows[3]] * 3, strict=True):
        if found is not adamw:
            gap = float(found[3]) - float(adamw[3])
            assert float(found[6]) == pytest.approx(abs(gap), abs=2e-3)
            assert found[7] == ("higher" if gap > 0 else "lower") or abs(gap) < 2e-3
    assert "28 of 28 lora_A moved (measured at step 2); 28 of 28 lora_B moved (measured at step 1)" in shown
    folder = examples / "demo_output" / "lora_sgd_sai"
    for name in ("gsnr_report.json", "gsnr_report.png", "README.md", "adapter_model.safetensors", "tokenizer.json"):
        assert (folder / name).is_file()
    assert (examples / "demo_output" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert max(len(line) for line in shown.splitlines() if "lora_A" not in line) <= 80
    assert "seems to diverge" not in caplog.text


def test_demo_says_when_to_take_which_from_the_figures(examples):
    import demo

    def row(optim, after, state, options=None):
        return {"optim": optim, "optim_args": options, "after": after, "state_bytes": state}

    rows = [row("adamw_torch", 2.0, 200), row("swan", 1.9, 16), row("sgd_sai", 2.04, 100, "lora_policy=paired")]
    assert list(demo.advice([*rows, row("sgd_sai", 2.3, 100)])) == [
        "  SWAN: take it (loss 0.100 lower, 8% of state)",
        "  SGD-SaI, paired: take it if memory counts (loss 0.040 higher, 50% of state)",
        "  SGD-SaI: only if memory decides (loss 0.300 higher, 50% of state)",
    ]


def test_finetune_script_takes_a_model_a_data_set_and_trainer_flags(examples):
    import offline

    tokenizer = offline.byte_tokenizer()
    model = tiny_llama()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(examples / "model")
    tokenizer.save_pretrained(examples / "model")
    (examples / "data").mkdir()
    rows = [json.dumps({"body": f"Sentence number {i} of a small data set."}) for i in range(100)]
    (examples / "data" / "train.jsonl").write_text("\n".join(rows))
    command = (
        "--model_name_or_path model --dataset_name data --text_column body --block_size 16 --output_dir out "
        "--max_steps 3 --optim_args momentum=0.5,normalize=max --learning_rate 0.02 --lora_r 2 --seed 7"
    )
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "finetune_lora.py"), *command.split()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((examples / "out" / "gsnr_report.json").read_text())
    assert (report["options"]["momentum"], report["options"]["normalize"]) == (0.5, "max")
    assert report["run"]["seed"] == 7
    assert "Held-out loss" in done.stdout
    assert "seems to diverge" not in done.stderr


def test_finetune_script_refuses_a_typing_error(examples):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "finetune_lora.py"), "--optim", "sgdsai"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "invalid choice: 'sgdsai'" in done.stderr


def test_byte_tokenizer_gives_the_text_back(examples):
    import offline

    tokenizer = offline.byte_tokenizer()
    text = "def f(x):\n\treturn 'zwölf' + x  # ✓"
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) == len(text.encode())
    assert tokenizer.decode(tokens) == text


def test_offline_texts_are_split_without_overlap(examples):
    import offline

    for texts in (offline.documentation(), offline.standard_library_source(200_000)):
        assert len(texts["test"]) > 0
        assert not set(texts["train"]["text"]) & set(texts["test"]["text"])


def script(name, flags, **environment):
    """An example as a process of its own; it has to end well."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), "--report_to", "none", *flags.split()],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "seems to diverge" not in done.stderr
    return done.stdout


def assert_report_and_card(folder, optim):
    """The report in a folder, whose card has our section once."""
    report = GSNRReport.load(folder)
    assert report.optimizer == optim
    assert (folder / "README.md").read_text().count("<!-- hf-sai:begin -->") == 1
    return report


def byte_model(folder):
    """A tiny Llama for bytes in a folder, without a chat template."""
    import offline

    tokenizer = offline.byte_tokenizer()
    model = tiny_llama()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_sft_trains_an_adapter_on_answers(examples):
    shown = script("sft.py", "--pretrain_steps 2 --max_steps 3 --per_device_train_batch_size 4 --seed 5")
    folder = examples / "demo_output" / "sft"
    report = assert_report_and_card(folder, "sgd_sai")
    # The first warm-up step has learning rate 0: B leaves zero in the second, and A has a gradient in the third.
    assert {("lora_A" in row.name, row.step) for row in report.tensors} == {(True, 3), (False, 1)}
    assert (len(report.tensors), report.state_bytes) == (56, 156_160)
    assert report.learning_rate == pytest.approx(0.04)
    assert report.run["seed"] == 5
    assert report.to_text() in shown
    assert "trained using [TRL]" in (folder / "README.md").read_text()
    saved = load_file(folder / "adapter_model.safetensors")
    assert [bool(value.any()) for name, value in saved.items() if "lora_B" in name] == [True] * 28
    assert "generation" in (folder / "chat_template.jinja").read_text()


def test_sft_takes_chats_of_its_own_and_trains_without_adapter(examples):
    byte_model(examples / "model")
    (examples / "data").mkdir()
    turns = [[("user", f"How much is {i} + 1?"), ("assistant", f"{i + 1}.")] for i in range(100)]
    rows = [{"messages": [{"role": r, "content": c} for r, c in each], "source": "made up"} for each in turns]
    (examples / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = "--max_steps 3 --max_length 64 --lora_r 0 --learning_rate 0.01 --optim_args momentum=0.5 --output_dir out"
    script("sft.py", f"--model_name_or_path model --dataset_name data {flags}")
    report = assert_report_and_card(examples / "out", "sgd_sai")
    assert report.options["momentum"] == 0.5
    assert not [row.name for row in report.tensors if "lora" in row.name]
    assert len(report.tensors) == 21
    assert not (examples / "out" / "adapter_model.safetensors").exists()


def test_only_answers_are_learned(examples):
    import offline

    tokenizer = offline.byte_tokenizer()
    messages = offline.documentation_chats()["test"][0]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    tokens = tokenizer.apply_chat_template(
        messages,
        chat_template=offline.CHAT_TEMPLATE,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    learned = [token for token, mask in zip(tokens["input_ids"], tokens["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(learned) == messages[1]["content"] + "<|endoftext|>"
    whole = f"<user>{messages[0]['content']}<assistant>{messages[1]['content']}<|endoftext|>"
    assert tokenizer.decode(tokens["input_ids"]) == whole


def test_chats_are_held_out_by_topic(examples):
    import offline

    chats, texts = offline.documentation_chats(), offline.documentation()
    assert min(len(chats["train"]), len(chats["test"])) > 20
    titles = {
        part: {re.search(r"say on (.*)\? Part \d+\.$", row["messages"][0]["content"])[1] for row in chats[part]}
        for part in chats
    }
    assert not titles["train"] & titles["test"]
    for part in chats:
        joined = " ".join(" ".join(text.split()) for text in texts[part]["text"])
        assert all(row["messages"][1]["content"] in joined for row in chats[part])


def test_pretraining_with_swan_keeps_nothing_for_matrices(examples):
    shown = script("pretrain_llama.py", "--max_steps 3 --warmup_steps 1 --per_device_train_batch_size 4")
    folder = examples / "demo_output" / "pretrain_swan"
    report = assert_report_and_card(folder, "swan")
    matrices = [row for row in report.routes if row.route == "matrix"]
    assert len(matrices) == 4 * 7
    assert sum(row.numel for row in report.routes) == sum(
        value.numel() for value in load_file(folder / "model.safetensors").values()
    )
    adam = sum(row.numel for row in report.routes if row.route == "adam")
    total = adam + sum(row.numel for row in matrices)
    assert f"28 tensors whitened ({1 - adam / total:.1%} of the elements), 11 to Adam." in shown
    assert 8 * adam <= report.state_bytes < 8 * adam + 1000  # two moments in float32, and Adam's step for each tensor
    assert report.adamw_state_bytes == 8 * total
    assert f"Optimizer state {report.state_bytes:,} bytes; AdamW's: {8 * total:,}" in shown


def test_pretraining_takes_the_configuration_and_not_the_weights(examples, monkeypatch):
    import pretrain_llama
    import torch

    byte_model(examples / "model")
    model, tokenizer = pretrain_llama.new_model("model", seed=1)
    saved = load_file(examples / "model" / "model.safetensors")["model.embed_tokens.weight"]
    assert model.model.embed_tokens.weight.shape == saved.shape == (len(tokenizer), 16)
    assert not torch.equal(model.model.embed_tokens.weight.detach(), saved)
    (examples / "data").mkdir()
    rows = [json.dumps({"body": f"Sentence number {i} of a small data set."}) for i in range(100)]
    (examples / "data" / "train.jsonl").write_text("\n".join(rows))
    flags = "--dataset_name data --text_column body --block_size 16 --max_steps 2 --output_dir out --optim adamw_torch"
    monkeypatch.setattr(sys, "argv", ["pretrain_llama.py", "--model_name_or_path", "model", *flags.split()])
    pretrain_llama.main()
    assert not (examples / "out" / "gsnr_report.json").exists()  # AdamW runs through the same script
    assert (examples / "out" / "model.safetensors").is_file()


def test_classifier_learns_digits(examples):
    pytest.importorskip("sklearn", reason="the environment is older than the extra `examples`")
    import numpy as np
    import torch
    from transformers import ViTForImageClassification, ViTImageProcessor

    shown = script("classify_images.py", "--max_steps 5 --warmup_steps 0")
    folder = examples / "demo_output" / "digits"
    report = assert_report_and_card(folder, "sgd_sai")
    assert {row.status for row in report.tensors} == {"measured"}
    assert report.adamw_state_bytes == 2 * report.state_bytes
    import offline

    rows = offline.digits()["test"]
    pixels = ViTImageProcessor.from_pretrained(folder)([row.convert("RGB") for row in rows["image"]])["pixel_values"]
    with torch.no_grad():
        outputs = ViTForImageClassification.from_pretrained(folder)(torch.tensor(np.stack(pixels))).logits
    share = (outputs.argmax(dim=-1) == torch.tensor(rows["label"])).float().mean().item()
    assert f"% before, {share:.1%} after" in shown
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {str(digit): str(digit) for digit in range(10)}
    assert (folder / "preprocessor_config.json").is_file()
    assert report.to_text() in shown


@pytest.mark.skipif(
    not is_torchvision_available() and Version(transformers.__version__) < Version("5.24"),
    reason="older versions read images by torchvision only",
)
def test_classifier_takes_a_model_and_images(examples, monkeypatch, capsys):
    import classify_images
    import offline
    from PIL import Image
    from transformers import ViTImageProcessor

    offline.small_vit(["left", "right", "middle"]).save_pretrained(examples / "model")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(examples / "model")
    for label, level in (("dark", 10), ("light", 240)):
        (examples / "data" / label).mkdir(parents=True)
        for index in range(60):
            Image.new("L", (12, 10), level + index % 10).save(examples / "data" / label / f"{index}.png")
    flags = "--model_name_or_path model --dataset_name data --max_steps 4 --warmup_steps 0 --output_dir out"
    monkeypatch.setattr(sys, "argv", ["classify_images.py", *flags.split(), "--report_to", "none"])
    classify_images.main()
    assert_report_and_card(examples / "out", "sgd_sai")
    config = json.loads((examples / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "dark", "1": "light"}  # a new output layer, with the data set's classes
    assert "Held-out accuracy" in capsys.readouterr().out


def test_accuracy_is_the_share_of_right_classes(examples):
    import classify_images
    import numpy as np
    from transformers import EvalPrediction

    outputs = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.4], [2.0, 1.0]])
    prediction = EvalPrediction(predictions=outputs, label_ids=np.array([1, 0, 0, 0]))
    assert classify_images.accuracy(prediction) == {"accuracy": 0.75}


def test_digits_say_how_to_get_them(examples, monkeypatch):
    import offline

    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match=r'pip install -c constraints.txt "\.\[examples\]"'):
        offline.digits()
