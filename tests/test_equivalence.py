"""One training, four ways: a batch of 8, accumulated from ones, on two DDP processes, and interrupted and resumed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from support.models import tiny_llama, tiny_lora, token_blocks
from support.processes import free_port
from support.trainers import StopAt, arguments, trainable
from transformers import Trainer

from hf_sai import GSNRReport, SaITrainer


STEPS = 20
CASES = {
    "sgd_sai": ("sgd_sai", 0.02, None),
    "sgd_sai, max": ("sgd_sai", 2.0, "normalize=max"),
    # Two ways to sum a gradient differ in the last digits; bfloat16 arithmetic would make a bit of it.
    "swan": ("swan", 1e-3, "whitening_dtype=float32"),
}
TOLERANCE = {"sgd_sai": 1e-5, "sgd_sai, max": 1e-5, "swan": 1e-4}
MODELS = {"full": tiny_llama, "lora": tiny_lora}


def run(folder, case, model, stop=None, resume=None, **changed):
    """The trained weights."""
    optim, learning_rate, optim_args = CASES[case]
    settings = {"per_device_train_batch_size": 8, "max_steps": STEPS, "lr_scheduler_type": "cosine", **changed}
    settings |= {"optim": optim, "learning_rate": learning_rate, "optim_args": optim_args, "weight_decay": 0.1}
    callbacks = [StopAt(stop)] if stop else []
    trainer = SaITrainer(
        MODELS[model](), arguments(folder, **settings), train_dataset=token_blocks(96), callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainable(trainer.model)


def assert_equal(found, expected, tolerance):
    moved = 0.0
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
        moved = max(moved, value.abs().max().item())
    assert moved > 100 * tolerance


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Weights of the run with a batch of 8, made once for each case."""
    made = {}

    def of(case, model):
        if (case, model) not in made:
            made[case, model] = run(tmp_path_factory.mktemp("whole"), case, model)
        return made[case, model]

    return of


@pytest.fixture(scope="module")
def accumulates(tmp_path_factory):
    """Skips where the host's own accumulated gradient is another than that of the batch: with its SGD too, in 5.2."""
    weights = []
    for batch, accumulation in ((8, 1), (1, 8)):
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 2}
        settings |= {"optim": "sgd", "learning_rate": 0.02}
        trainer = Trainer(
            tiny_llama(), arguments(tmp_path_factory.mktemp("host"), **settings), train_dataset=token_blocks(96)
        )
        trainer.train()
        weights.append(trainer.model.lm_head.weight.detach())
    if not torch.allclose(*weights, rtol=0, atol=1e-6):
        pytest.skip("this transformers accumulates another gradient than that of the batch, with its own SGD too")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("accumulates")
def test_eight_accumulated_steps_are_one_batch_of_eight(tmp_path, whole, case, model):
    found = run(tmp_path, case, model, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    assert_equal(found, whole(case, model), TOLERANCE[case])
    assert GSNRReport.load(tmp_path).run["effective_batch_size"] == 8


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_interrupted_and_resumed_is_uninterrupted(request, tmp_path, whole, case, accumulation):
    if accumulation > 1:
        request.getfixturevalue("accumulates")
    cut = {"save_strategy": "steps", "save_steps": 7, "gradient_accumulation_steps": accumulation}
    cut["per_device_train_batch_size"] = 8 // accumulation
    run(tmp_path, case, "full", stop=7, **cut)
    found = run(tmp_path, case, "full", resume=str(tmp_path / "checkpoint-7"), **cut)
    assert_equal(found, whole(case, "full"), TOLERANCE[case])


def worker(rank, port, folder):
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    os.environ.update({key: str(value) for key, value in place.items()})
    for case in CASES:
        for model in MODELS:
            name = f"{case} {model}"
            found = run(Path(folder) / name, case, model, per_device_train_batch_size=4, ddp_backend="gloo")
            torch.save(found, Path(folder) / f"{name} {rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # as in test_distributed.py


def test_two_processes_are_one(tmp_path, whole):
    mp.spawn(worker, args=(free_port(), str(tmp_path)), nprocs=2, join=True)
    for case in CASES:
        for model in MODELS:
            for rank in range(2):
                found = torch.load(tmp_path / f"{case} {model} {rank}.pt")
                assert_equal(found, whole(case, model), TOLERANCE[case])
            report = GSNRReport.load(tmp_path / f"{case} {model}")
            assert (report.run["world_size"], report.run["effective_batch_size"]) == (2, 8)
