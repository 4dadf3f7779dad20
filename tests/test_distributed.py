"""Two real gloo processes: DDP and FSDP2 give what one process gives, and distributed checkpoints carry on."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import tiny_llama
from torch.distributed.checkpoint import load as dcp_load
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from hf_sai import SGDSaI


STEPS = 10


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


def options(normalize):
    return {"lr": 0.02, "normalize": normalize, "weight_decay": 0.1}


def train(model, optimizer, first, last, rank=None):
    for step, tokens in enumerate(batches()):
        if not first <= step < last:
            continue
        mine = tokens if rank is None else tokens[rank * 2 : rank * 2 + 2]
        loss_of(model, mine, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def shard(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def start(rank, port, worker, folder, normalize):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    worker(rank, Path(folder), normalize)
    dist.barrier()  # a rank that leaves while the other still talks makes gloo abort
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads are torn down in any order at exit, and under load one then aborts the process


def on_two_ranks(worker, folder, normalize):
    mp.spawn(start, args=(free_port(), worker, str(folder), normalize), nprocs=2, join=True)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def fsdp_worker(rank, folder, normalize):
    model = shard(uneven_llama())
    optimizer = SGDSaI(model.named_parameters(), **options(normalize))
    train(model, optimizer, 0, STEPS, rank)
    weights = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    torch.save({"weights": weights, "rows": optimizer.gsnr_statistics()}, folder / f"rank{rank}.pt")


def ddp_worker(rank, folder, normalize):
    from torch.nn.parallel import DistributedDataParallel

    model = uneven_llama()
    wrapped = DistributedDataParallel(LossModule(model))
    optimizer = SGDSaI(model.named_parameters(), **options(normalize))
    for step, tokens in enumerate(batches()):
        wrapped(tokens[rank * 2 : rank * 2 + 2], step).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.save({"weights": weights, "rows": optimizer.gsnr_statistics()}, folder / f"rank{rank}.pt")


class LossModule(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, step):
        return loss_of(self.model, tokens, step)


def save_worker(rank, folder, normalize):
    model = shard(uneven_llama())
    optimizer = SGDSaI(model.named_parameters(), **options(normalize))
    train(model, optimizer, 0, 5, rank)
    save(model, optimizer, folder / "checkpoint")


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


def one_process(normalize):
    model = uneven_llama()
    optimizer = SGDSaI(model.named_parameters(), **options(normalize))
    train(model, optimizer, 0, STEPS)
    return model, optimizer


@pytest.mark.parametrize("normalize", ["none", "max"])
@pytest.mark.parametrize("worker", [fsdp_worker, ddp_worker])
def test_two_processes_equal_one(tmp_path, worker, normalize):
    on_two_ranks(worker, tmp_path, normalize)
    model, optimizer = one_process(normalize)
    expected = {row.name: row for row in optimizer.gsnr_statistics()}
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=False)
        assert {row.name for row in found["rows"]} == set(expected)
        for row in found["rows"]:
            assert row.gsnr == pytest.approx(expected[row.name].gsnr, rel=1e-6)
            assert (row.numel, row.shape, row.step, row.status) == (
                expected[row.name].numel,
                expected[row.name].shape,
                expected[row.name].step,
                expected[row.name].status,
            )
        for name, param in model.named_parameters():
            torch.testing.assert_close(found["weights"][name], param.detach(), rtol=1e-5, atol=1e-5)
    assert expected["late"].step == 3


def moments_worker(rank, folder, normalize):
    """The same gradients whole and cut in two: g-SNR without the rounding of two different backward passes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from hf_sai.optim import gradient_moments, gradient_snr

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    tensors = [torch.randn(shape) + 0.3 for shape in [(1,), (3,), (5, 4), (4, 7), (1, 9), (64, 64)]]
    placements = [Shard(0), Shard(0), Shard(0), Shard(1), Shard(0), Replicate()]
    cut = [distribute_tensor(t, mesh, [p]) for t, p in zip(tensors, placements, strict=True)]
    calls = []
    original = dist.all_gather
    dist.all_gather = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    found = gradient_moments([tensors[0], *cut])
    for moments, exact in zip(found[1:], gradient_moments(tensors), strict=True):
        assert moments.count == exact.count
        if exact.count > 1:
            assert gradient_snr(moments, 1e-8) == pytest.approx(gradient_snr(exact, 1e-8), rel=1e-12)
    torch.save({"collectives": len(calls)}, folder / f"rank{rank}.pt")

    # A gradient that is laid out in another way than its parameter (here whole on each rank) is moved first.
    param = torch.nn.Parameter(distribute_tensor(tensors[3], mesh, [Shard(1)]))
    plain = torch.nn.Parameter(tensors[3].clone())
    param.grad, plain.grad = distribute_tensor(tensors[3] * 0.5, mesh, [Replicate()]), tensors[3] * 0.5
    for each in (param, plain):
        SGDSaI([each]).step()
    torch.testing.assert_close(param.detach().full_tensor(), plain.detach())


def test_moments_of_shards_are_those_of_the_whole_in_one_collective(tmp_path):
    on_two_ranks(moments_worker, tmp_path, "none")  # a failed assertion of a rank is raised here
    found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert found == [{"collectives": 1}] * 2


def test_saved_on_two_ranks_and_resumed_on_one(tmp_path):
    on_two_ranks(save_worker, tmp_path, "max")
    expected, expected_optimizer = one_process("max")
    model, optimizer = load_into_new(
        lambda model: SGDSaI(model.named_parameters(), **options("max")), tmp_path / "checkpoint"
    )
    train(model, optimizer, 5, STEPS)
    for (name, param), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    pairs = zip(optimizer.gsnr_statistics(), expected_optimizer.gsnr_statistics(), strict=True)
    assert all(a.gsnr == pytest.approx(b.gsnr, rel=2e-5) and a.step == b.step for a, b in pairs)
