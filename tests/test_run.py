"""`hf-sai run` and `python -m hf_sai.run` in processes of their own: a script sees what Python would give it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


HF_SAI = [sys.executable, "-c", "import sys; from hf_sai.cli import app; sys.exit(app(prog_name='hf-sai'))"]
LIKE_DIFFUSERS = str(Path(__file__).parent / "fixtures" / "script_like_diffusers.py")

PROBE = """
import atexit, os, signal, sys
import click
def fail(reason: int = 0):
    raise KeyError("from the script")
print(sys.argv, __name__, __file__, sys.path[0], __package__ or "", fail.__annotations__)
print(getattr(__spec__, "name", None))
print(sys.modules["__main__"].__dict__ is globals(), click.get_current_context(silent=True))
atexit.register(lambda: print("atexit", vars(sys.modules["__main__"]) is globals(), flush=True))
sys.stdout.flush()
if "exit" in sys.argv:
    sys.exit(3)
if "raise" in sys.argv:
    fail()
if "interrupt" in sys.argv:
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
"""


def call(command, cwd, **env):
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored by what a shell has put behind
    )


@pytest.fixture
def folder(tmp_path):
    """A working directory, with the probe in a folder below and a broken script."""
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "probe.py").write_text(PROBE)
    (tmp_path / "broken.py").write_text("x = (\n")
    return tmp_path


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "arguments",
    [
        ["below/probe.py", "--optim", "x", "--", "--help", "-m", "--optim_args=y"],
        ["below/probe.py", "exit"],
        ["below/probe.py", "raise"],
        ["below/probe.py", "interrupt"],
        ["-m", "below.probe", "--optim", "x", "-m"],
        ["broken.py"],
        ["missing.py"],
        ["-m", "missing"],
        ["-m", "json"],
    ],
    ids=lambda arguments: "_".join(arguments[:2]),
)
def test_a_script_runs_as_by_python_itself(folder, arguments):
    by_python = call([sys.executable, *arguments], folder)
    by_us = call([*HF_SAI, "run", *arguments], folder)
    assert by_us.stdout == by_python.stdout
    assert by_us.stderr == by_python.stderr
    assert by_us.returncode == by_python.returncode
    expected = {"exit": 3, "raise": 1, "interrupt": -signal.SIGINT, "broken.py": 1, "missing.py": 2}
    assert by_us.returncode == expected.get(arguments[-1], 1 if arguments[-1] in ("missing", "json") else 0)


@pytest.mark.timeout(60)
def test_the_traceback_of_a_module_begins_with_the_module(folder):
    done = call([sys.executable, "-m", "hf_sai.run", "-m", "below.probe", "raise"], folder)
    assert done.returncode == 1
    first, frame, *_ = done.stderr.splitlines()
    assert first == "Traceback (most recent call last):"
    assert frame == f'  File "{folder}/below/probe.py", line 14, in <module>'
    assert done.stderr.splitlines()[-1] == "KeyError: 'from the script'"


@pytest.mark.timeout(60)
def test_names_are_registered_before_the_script_builds_its_parser(tmp_path):
    (tmp_path / "train.py").write_text(
        "from transformers import HfArgumentParser, TrainingArguments\n"
        "(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()\n"
        "print(args.optim.value, args.optim_args)\n"
    )
    arguments = ["train.py", "--output_dir", "out", "--optim", "swan", "--optim_args", "scale=2", "--use_cpu"]
    done = call([*HF_SAI, "run", *arguments], tmp_path)
    assert (done.stdout, done.stderr, done.returncode) == ("swan scale=2\n", "", 0)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bad", "probe.py"], "No such option: --bad"),
        ([], "Missing argument"),
        (["--optim", "nope", "probe.py"], "choose one of: sgd_sai"),
        (["--optim_args", "a=1", "probe.py"], "need an optimizer, but 'a=1' stands alone"),
    ],
)
def test_a_wrong_option_before_the_script_is_an_error(folder, arguments, message):
    done = call([*HF_SAI, "run", *arguments], folder / "below")
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr


@pytest.mark.timeout(60)
def test_help_before_the_script_is_the_launchers(folder):
    done = call([*HF_SAI, "run", "--help", "below/probe.py"], folder, COLUMNS="80")
    assert done.returncode == 0
    assert "hf-sai run --optim sgd_sai" in done.stdout
    assert "hf-sai run train.py --optim sgd_sai" in done.stdout


@pytest.mark.timeout(60)
def test_an_optimizer_that_is_not_reached_is_an_error_of_the_process(tmp_path):
    command = [*HF_SAI, "run", "--optim", "sgd_sai", "--optim_args", "momentum=0.5", LIKE_DIFFUSERS]
    done = call([*command, "--output", ".", "--use_8bit_adam"], tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("remove --use_8bit_adam from the script's options")
    frames = [line for line in done.stderr.splitlines() if line.startswith("  File ")]
    assert frames[0].startswith(f'  File "{LIKE_DIFFUSERS}", line ')


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """A model, a tokenizer and a data set on disk, and the options that train on them for two steps."""
    root = tmp_path_factory.mktemp("sft")
    words = ["<pad>", "<eos>", "<unk>", *[f"w{index}" for index in range(29)]]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(root / "model")
    tiny_llama().save_pretrained(root / "model")
    (root / "data").mkdir()
    rows = [{"text": " ".join(f"w{row * word % 29}" for word in range(1, 9))} for row in range(16)]
    (root / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = "--use_cpu --bf16 False --report_to none --max_steps 2 --per_device_train_batch_size 2"
    names = ["--model_name_or_path", str(root / "model"), "--dataset_name", str(root / "data"), *options.split()]
    return ["-m", "trl.scripts.sft", *names, "--save_steps", "2"]


def saved_optimizer(folder):
    return torch.load(folder / "out" / "checkpoint-2" / "optimizer.pt", weights_only=True)


def check_sft(saved, optim, peft):
    """That the optimizer which was saved is the one that was asked for, over what was to be trained."""
    count = sum(len(group["params"]) for group in saved["param_groups"])
    assert count == (28 if peft else 21)
    if optim == "sgd_sai":
        assert all(group["momentum"] == 0.8 for group in saved["param_groups"])
        assert sum(state["gsnr"] > 0 for state in saved["state"].values()) >= 14
    else:
        assert all(group["scale"] == 2.0 for group in saved["param_groups"])
        reasons = {reason for group in saved["param_groups"] for reason in group["reasons"]}
        assert {"LoRA B"} < reasons if peft else {"linear layer", "embedding"} <= reasons


@pytest.mark.timeout(120)
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("optim", "given"), [("sgd_sai", "momentum=0.8"), ("swan", "scale=2.0")])
def test_trl_sft_unmodified(sft, tmp_path, optim, given, peft):
    adapter = ["--use_peft", "--lora_r", "2", "--lora_target_modules", "all-linear"] if peft else []
    done = call(
        [*HF_SAI, "run", *sft, "--output_dir", "out", "--optim", optim, "--optim_args", given, *adapter], tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "hf_sai" not in done.stderr + done.stdout
    check_sft(saved_optimizer(tmp_path), optim, peft)


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def assert_ended(done):
    """
    Both processes came to their end. Under load gloo's threads (torch 2.13) at times abort a process that is through
    with its script and has left the group; what it wrote before is then what counts.
    """
    assert done.returncode == 0 or "terminate called without an active exception" in done.stderr, done.stderr


@pytest.mark.timeout(150)
def test_two_processes_through_torchrun_end_with_the_same_weights(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    own = ["-m", "hf_sai.run", "--optim", "sgd_sai", "--optim_args", "momentum=0.5", LIKE_DIFFUSERS]
    script = ["--output", str(tmp_path), "--params", "groups", "--learning_rate", "0.1"]
    done = call([*launcher, *own, *script], tmp_path, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    assert_ended(done)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert [group["momentum"] for group in one["state"]["param_groups"]] == [0.5, 0.5]
    for part in ("unet", "text_encoder"):
        for before, first, second in zip(one["before"][part], one["after"][part], two["after"][part], strict=True):
            assert torch.equal(first, second)
            assert not torch.equal(before, first)


# The Trainer's script leaves the process group to the interpreter's exit, where gloo (torch 2.13) at times aborts one
# process and leaves the other waiting. Seen in one of three runs of all tests, so it is asked for by name.
@pytest.mark.skipif("HF_SAI_LAUNCH_TESTS" not in os.environ, reason="gloo may hang at exit: HF_SAI_LAUNCH_TESTS=1")
@pytest.mark.timeout(150)
def test_two_processes_through_accelerate_launch(sft, tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--main_process_port", free_port(), "-m", "hf_sai.run"]
    arguments = [*sft, "--output_dir", "out", "--optim", "swan", "--optim_args", "scale=2.0"]
    done = call([*launcher, *arguments], tmp_path, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    assert_ended(done)
    check_sft(saved_optimizer(tmp_path), "swan", peft=False)
    states = list((tmp_path / "out" / "checkpoint-2").glob("rng_state_*.pth"))
    assert len(states) == 2  # one per process: a launch that fell back to one process writes rng_state.pth
