"""The example scripts themselves, with few steps."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_llama


EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def examples(monkeypatch, tmp_path):
    """The examples' folder on the path, and a folder of its own to write to."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_demo_prints_its_table_and_writes_what_it_names(examples, monkeypatch, capsys):
    import demo

    monkeypatch.setattr(demo, "PRETRAIN_STEPS", 3)
    monkeypatch.setattr(demo, "FINETUNE_STEPS", 4)
    demo.main()
    shown = capsys.readouterr().out
    rows = re.findall(
        r"^(pre-train on Python code|LoRA on documentation) +(\w+) +([\d.]+) -> ([\d.]+) +([\d,]+)", shown, re.M
    )
    assert [row[:2] for row in rows] == [
        ("pre-train on Python code", "sgd_sai"),
        ("pre-train on Python code", "adamw_torch"),
        ("LoRA on documentation", "sgd_sai"),
        ("LoRA on documentation", "adamw_torch"),
    ]
    sizes = [int(row[4].replace(",", "")) for row in rows]
    assert [round(sizes[1] / sizes[0], 2), round(sizes[3] / sizes[2], 2)] == [2.0, 2.0]
    assert rows[2][2] == rows[3][2]  # both adapters start from the same model
    assert "28 of 28 lora_A moved (measured at step 2); 28 of 28 lora_B moved (measured at step 1)" in shown
    folder = examples / "demo_output" / "lora_sgd_sai"
    for name in ("gsnr_report.json", "gsnr_report.png", "README.md", "adapter_model.safetensors", "tokenizer.json"):
        assert (folder / name).is_file()
    assert max(len(line) for line in shown.splitlines() if line.startswith(("pre-train", "LoRA on"))) <= 80


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
