"""Two gloo processes, a model that they share unevenly, and its distributed checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from packaging.version import Version
from torch.distributed.checkpoint import load as dcp_load
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from support.models import tiny_llama
from support.processes import free_port


STEPS = 10


fsdp_takes_the_mean = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.9"), reason="FSDP2 of torch 2.8 adds up gradients on the CPU"
)


def batches(count=STEPS):
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(0, 32, (4, 10), generator=generator) for _ in range(count)]


def uneven_llama():
    """A size that two ranks can't share evenly, a scalar that multiplies the loss, and a part without gradient."""
    model = tiny_llama()
    model.odd = torch.nn.Linear(3, 5)
    model.late = torch.nn.Parameter(torch.zeros(7))
    return model


def loss_of(model, tokens, step):
    """A mean over the rows, so that the mean of two halves is that of the whole."""
    loss = model(tokens, labels=tokens).loss + model.odd(tokens[:, :3] / 32).square().mean()
    return loss + (model.late * torch.arange(7.0)).sum() * (1e-2 if step >= 2 else 0.0)


class LossModule(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, step):
        return loss_of(self.model, tokens, step)


def train(model, optimizer, first, last, rank=None):
    for step, tokens in enumerate(batches()):
        if not first <= step < last:
            continue
        mine = tokens if rank is None else tokens[rank * 2 : rank * 2 + 2]
        loss_of(model, mine, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def shard(model, **options):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def start(rank, port, worker, folder, normalize):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    worker(rank, Path(folder), normalize)
    dist.barrier()  # a rank that leaves while the other still talks makes gloo abort
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads are torn down in any order at exit, and under load one then aborts the process


def on_two_ranks(worker, folder, normalize):
    mp.spawn(start, args=(free_port(), worker, str(folder), normalize), nprocs=2, join=True)


def save(model, optimizer, folder):
    """A distributed checkpoint."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp_save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)


def load_into_new(optimizer_of, folder):
    """A model and an optimizer that have from a distributed checkpoint all that they have."""
    model = uneven_llama()
    for param in model.parameters():
        param.data.zero_()
    optimizer = optimizer_of(model)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp_load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return model, optimizer
