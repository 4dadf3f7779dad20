"""Training that is killed (SIGKILL), in saves too, and resumed: bit-equal to one that nothing interrupted."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from support.models import tiny_lora, token_blocks
from support.pictures import no_pictures
from support.trainers import arguments, trainable
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_sai import GSNRReport, SaITrainer
from hf_sai.files import copy_whole


STEPS = 12
LONG = "HF_SAI_LONG_TESTS" in os.environ


class Slow(TrainerCallback):
    """So that a kill from outside lands between the third step and the last."""

    def __init__(self, started):
        self.started = started

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.started.set()
        time.sleep(0.03 if state.global_step < STEPS else 60.0)


def train(folder, save_steps, resume, callbacks):
    torch.set_num_threads(1)
    args = arguments(folder, max_steps=STEPS, save_strategy="steps", save_steps=save_steps, weight_decay=0.1)
    model = tiny_lora(lora_dropout=0.2)  # takes random numbers, whose state has to come back too
    trainer = SaITrainer(model, args, train_dataset=token_blocks(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    torch.save(trainable(model), Path(folder) / "final.pt")


def kill_at_write(folder, name, count):
    """Kills this process when it opens a file for writing for that many times, with half of it written."""
    left = [count]

    def watch(event, details):
        if event != "open" or not str(details[0]).startswith(str(folder)) or str(details[1])[0] not in "wax":
            return
        left[0] -= name in str(details[0])
        if left[0] == 0:
            descriptor = os.open(details[0], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.write(descriptor, b'{"half": [')
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def worker(folder, save_steps, resume=None, started=None, write=None, pictures=False):
    """A training in a process of its own, which may be killed from outside, or at a write."""
    gc.freeze()  # what was imported before is not looked through by every collection
    if not pictures:  # they take more time than the training: most moments would be in one
        no_pictures()
    if write is not None:
        kill_at_write(folder, *write)
    train(folder, save_steps, resume, [Slow(started)] if started is not None else [])


def run(processes, folder, save_steps, resume=None):
    process = processes.Process(target=worker, args=(str(folder), save_steps, resume))
    process.start()
    process.join(120)
    assert process.exitcode == 0


def run_killed(processes, folder, save_steps, write=None, after=0.0, pictures=False):
    """Killed at a write, or some seconds after the third step."""
    started = processes.Event()
    process = processes.Process(target=worker, args=(str(folder), save_steps, None, started, write, pictures))
    process.start()
    if write is None:
        assert started.wait(120)
        time.sleep(after)
        process.kill()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert not (folder / "final.pt").exists()


@pytest.fixture(scope="module")
def whole(processes, tmp_path_factory):
    """A run that nothing interrupts; how often it saves makes no difference to it."""
    folder = tmp_path_factory.mktemp("whole")
    run(processes, folder, 2)
    return folder


def complete_checkpoint(folder):
    """The newest whose `trainer_state.json` loads, which the host writes last, and how many are newer."""
    found = sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda path: -int(path.name.split("-")[1]))
    for newer, path in enumerate(found):
        try:
            TrainerState.load_from_json(str(path / "trainer_state.json"))
        except (OSError, ValueError):
            continue
        return path, newer
    return None, len(found)


def half_state(moment):
    return {"write": ("/trainer_state.json", moment.randint(2, 5))}


def any_write(moment):
    return {"write": ("", moment.randint(9, 33))}  # the first save ends with the eighth of 35 or more


def any_time(moment):
    return {"after": moment.uniform(0.0, 0.4)}


KILLS = {any_time: 20 if LONG else 3, any_write: 7 if LONG else 3, half_state: 7 if LONG else 3}


@pytest.mark.parametrize(("kill", "seed"), [(kill, seed) for kill, count in KILLS.items() for seed in range(count)])
def test_a_killed_run_resumed_equals_one_that_was_not(tmp_path, processes, whole, seed, kill):
    save_steps = 1 if kill is half_state else 1 + seed % 2
    run_killed(processes, tmp_path, save_steps, **kill(random.Random(seed)))
    checkpoint, newer = complete_checkpoint(tmp_path)
    assert checkpoint is not None
    if kill is half_state:
        assert newer == 1  # which resume_from_checkpoint=True would have taken
    GSNRReport.load(tmp_path)
    GSNRReport.load(checkpoint)
    run(processes, tmp_path, save_steps, str(checkpoint))
    expected, found = (torch.load(folder / "final.pt") for folder in (whole, tmp_path))
    assert expected.keys() == found.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
    reports = [GSNRReport.load(folder) for folder in (whole, tmp_path, tmp_path / f"checkpoint-{STEPS}")]
    assert reports[0] == reports[1] == reports[2]


@pytest.mark.parametrize("name", ["gsnr_report.json", "gsnr_report.png"])
def test_a_report_in_a_checkpoint_is_whole_or_not_there(tmp_path, processes, name):
    """It is written beside its place and moved there; killed in between, the checkpoint has none and is not whole."""
    run_killed(processes, tmp_path, 2, write=(f"checkpoint-4/_{name}", 1), pictures=True)
    assert not (tmp_path / "checkpoint-4" / name).exists()
    checkpoint, newer = complete_checkpoint(tmp_path)
    assert (checkpoint.name, newer) == ("checkpoint-2", 1)
    assert (checkpoint / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_report_that_is_there_already_is_not_written_again(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"report")
    copy_whole(source, target)
    first = target.stat()
    copy_whole(source, target)
    assert target.stat().st_ino == first.st_ino  # a second write would have put another file in its place
    source.write_bytes(b"another")
    copy_whole(source, target)
    assert target.read_bytes() == b"another"
    copy_whole(tmp_path / "missing", target)
    assert target.read_bytes() == b"another"
