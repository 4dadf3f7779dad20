"""`hf-sai run` and `python -m hf_sai.run` in processes of their own: a script sees what Python would give it."""

from __future__ import annotations

import datetime
import signal
import sys
from pathlib import Path

import pytest
import torch
from support.processes import HF_SAI, assert_ended, call, free_port

from hf_sai import GSNRReport


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


@pytest.mark.timeout(150)
def test_two_processes_through_torchrun_end_with_the_same_weights(tmp_path):
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    own = ["-m", "hf_sai.run", "--optim", "sgd_sai", "--optim_args", "momentum=0.5", LIKE_DIFFUSERS]
    script = ["--output", str(tmp_path), "--params", "groups", "--learning_rate", "0.1"]
    done = call([*launcher, *own, *script], tmp_path, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    assert_ended(done)
    assert done.stderr.count("hf-sai: SGDSaI ran, 4 steps; report in ") == 1  # the first process alone
    report = GSNRReport.load(tmp_path)
    assert datetime.date.fromisoformat(report.run.pop("date"))
    assert (report.run, len(report.tensors)) == ({"measurements": 13, "world_size": 2}, 13)
    assert (tmp_path / "gsnr_report.png").is_file()
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert [group["momentum"] for group in one["state"]["param_groups"]] == [0.5, 0.5]
    for part in ("unet", "text_encoder"):
        for before, first, second in zip(one["before"][part], one["after"][part], two["after"][part], strict=True):
            assert torch.equal(first, second)
            assert not torch.equal(before, first)
