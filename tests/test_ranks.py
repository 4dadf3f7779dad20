"""Two real processes of a Trainer (DDP on gloo): no rank waits for what only rank 0 does, or fails to do."""

from __future__ import annotations

import logging
import os

import pytest
import torch
from helpers import arguments, tiny_lora, token_blocks, trainable
from test_distributed import free_port

from hf_sai import GSNRReport, SaIConfig, SaITrainer


COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "reduce",
    "reduce_scatter",
    "scatter",
)


def record_collectives():
    """The names of all that this process calls from now on, in order."""
    called = []

    def recorded(name, original):
        def call(*args, **kwargs):
            called.append(name)
            return original(*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(torch.distributed, name, recorded(name, getattr(torch.distributed, name)))
    return called


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


def rank_main(rank, port, folder, optim, failing):
    """A training with tracking, saves that are pushed, a card, and a push at the end; the Hub can't be reached."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    os.environ.update({key: str(value) for key, value in place.items()})
    from hf_sai.report import plots, report

    plots.report_png = plots.history_png = lambda report: b"a picture"
    if failing and rank == 0:
        report.write_whole = full_disk
    warned = []
    logging.getLogger("hf_sai").addHandler(type("Keep", (logging.Handler,), {"emit": lambda _, r: warned.append(r)})())
    changed = {"save_strategy": "steps", "save_steps": 2, "ddp_backend": "gloo", "max_steps": 4}
    args = arguments(folder / "out", optim=optim, learning_rate={"sgd_sai": 0.02, "swan": 2e-3}[optim], **changed)
    config = SaIConfig(gsnr_track_steps=1 if optim == "sgd_sai" else 0, hub_strict=failing)
    trainer = SaITrainer(tiny_lora(), args, train_dataset=token_blocks(), sai_config=config)
    args.push_to_hub, trainer.hub_model_id, trainer.push_in_progress = True, "user/model", None
    called = record_collectives()
    trainer.train()
    trainer.create_model_card()
    pushed = None
    try:
        trainer.push_to_hub()
    except Exception as error:
        pushed = type(error).__name__
    found = {"called": called, "pushed": pushed, "warned": [record.getMessage() for record in warned]}
    torch.save({**found, "weights": trainable(trainer.model)}, folder / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # as in test_distributed.py


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("optim", "failing"), [("sgd_sai", False), ("sgd_sai", True), ("swan", True)])
def test_nothing_that_rank_0_does_alone_is_waited_for(processes, tmp_path, optim, failing):
    port = free_port()
    ranks = [processes.Process(target=rank_main, args=(rank, port, tmp_path, optim, failing)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(150)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()  # one that waits is an error here, and must not outlive it
    assert codes == [0, 0]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert first["called"] == second["called"]
    assert first["called"]
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    assert (first["pushed"], second["pushed"]) == ("PushError" if failing else None, None)
    assert any("user/model" in text for text in first["warned"])  # the pushes of the saves
    warned = [text for text in first["warned"] if "could not be written; training goes on" in text]
    assert bool(warned) == failing
    assert second["warned"] == []
    if not failing:
        report = GSNRReport.load(tmp_path / "out")
        assert (report.run["world_size"], report.run["effective_batch_size"]) == (2, 8)
        assert GSNRReport.load(tmp_path / "out" / "checkpoint-4") == report
