"""`hf-sai run` and `python -m hf_sai.run` in processes of their own: a script sees what Python would give it."""

from __future__ import annotations

import datetime
import os
import signal
import sys
import sysconfig
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
def test_a_command_of_this_environment_needs_no_path(folder):
    """`accelerate` is one, as llamafactory-cli, swift and axolotl are; a clone's folder of that name is none."""
    path = str(Path(sysconfig.get_path("scripts")) / "accelerate")
    (folder / "accelerate").mkdir()
    by_python = call([sys.executable, path, "launch", "-m", "below.probe"], folder)
    assert by_python.stdout.startswith(f"['{folder}/below/probe.py'] __main__")
    by_us = call([*HF_SAI, "run", "accelerate", "launch", "-m", "below.probe"], folder)
    assert (by_us.stdout, by_us.returncode) == (by_python.stdout, 0)
    (folder / "accelerate" / "__main__.py").write_text("print('the folder')")
    assert call([*HF_SAI, "run", "accelerate"], folder).stdout == "the folder\n"


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


CHILD = """
import sys
before = "hf_sai" in sys.modules
import transformers
known = "hf_sai" in sys.modules
print(before, known, [each for each in sys.path if "hf_sai" in each], getattr(sys, "mark", None))
"""
PARENT = """
import os, subprocess, sys
command = [sys.executable, *sys.argv[1:]]
print(subprocess.run(command, capture_output=True, text=True).stdout, end="")
if "-c" not in command:  # and one that a child starts
    again = "import subprocess, sys; subprocess.run(sys.argv[1:], check=True)"
    print(subprocess.run([sys.executable, "-c", again, *command], capture_output=True, text=True).stdout, end="")
"""


@pytest.mark.parametrize(
    ("arguments", "changed", "expected"),
    [
        (["child.py"], {}, "False True [] theirs\n" * 2),
        (["child.py"], {"HF_SAI_CHILDREN": "0"}, "False False [] theirs\n" * 2),
        (["-E", "child.py"], {}, "False False [] None\n" * 2),
        (["-c", "import sys; print('hf_sai' in sys.modules, 'wrapt' in sys.modules)"], {}, "False False\n"),
    ],
)
def test_children_of_a_script_know_the_names_when_they_need_them(tmp_path, arguments, changed, expected):
    """As llamafactory-cli, swift and axolotl start theirs. The sitecustomize of others runs as ever."""
    (tmp_path / "child.py").write_text(CHILD)
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "sitecustomize.py").write_text("import sys\nsys.mark = 'theirs'\n")
    path = os.pathsep.join([str(tmp_path / "others"), str(Path(__file__).parent.parent)])
    done = call([*HF_SAI, "run", "parent.py", *arguments], tmp_path, PYTHONPATH=path, **changed)
    assert (done.stdout, done.returncode) == (expected, 0)


def test_torchrun_that_a_script_starts_trains_and_reports(tmp_path):
    (tmp_path / "train.py").write_text(
        "import sys, torch\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments\n"
        "size = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)\n"
        "model = LlamaForCausalLM(LlamaConfig(**size))\n"
        "rows = [dict.fromkeys(('input_ids', 'labels'), torch.arange(8)) for _ in range(4)]\n"
        "args = TrainingArguments('out', optim='sgd_sai', max_steps=1, use_cpu=True, report_to='none')\n"
        "trainer = Trainer(model, args, train_dataset=rows)\n"
        "trainer.train()\n"
        "trainer.create_model_card()\n"
    )
    (tmp_path / "cli.py").write_text(
        "import subprocess, sys\n"
        "command = ['torch.distributed.run', '--nproc_per_node', '1', '--master_port', sys.argv[1], 'train.py']\n"
        "sys.exit(subprocess.run([sys.executable, '-m', *command]).returncode)\n"
    )
    done = call([*HF_SAI, "run", "cli.py", str(free_port())], tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("learning_rate is 5e-05, the default of TrainingArguments, which is made for Adam") == 1
    assert len(GSNRReport.load(tmp_path / "out").tensors) == 12
    assert "<!-- hf-sai:begin -->" in (tmp_path / "out" / "README.md").read_text()


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
