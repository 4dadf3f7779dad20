"""SWAN on two real gloo processes: sharded matrices are whitened whole and once, and weights equal one process's."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist
from support.distributed import (
    STEPS,
    LossModule,
    batches,
    fsdp_takes_the_mean,
    load_into_new,
    on_two_ranks,
    save,
    shard,
    train,
    uneven_llama,
    whole,
)

import hf_sai
from hf_sai.optim import SWAN, matrices, sharding, sharing
from hf_sai.optim.sharding import ShardingError


def optimizer_of(model, **options):
    # Rounding of two different backward passes is magnified by small directions; ten steps of it stay below 1e-4.
    settings = {"lr": 1e-3, "whitening_dtype": "float32", **options}
    return SWAN(hf_sai.param_groups(model, "swan", weight_decay=0.1), **settings)


def options_of(name):
    return {"momentum": 0.9} if name == "momentum" else {}


def save_weights(model, rank, folder, **more):
    weights = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    torch.save({"weights": weights, **more}, folder / f"rank{rank}.pt")


def fsdp_worker(rank, folder, name):
    from torch.distributed.fsdp import CPUOffloadPolicy

    moves, moved = [], sharding.moved
    for module in (sharding, sharing):
        module.moved = lambda values, device: moves.append(isinstance(device, str)) or moved(values, device)
    options = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if name == "offloaded" else {}
    model = shard(uneven_llama(), **options)
    optimizer = optimizer_of(model, **options_of(name))
    train(model, optimizer, 0, STEPS, rank)
    # Pieces to the device of the mesh, by its name, and updates back to that of the pieces.
    assert moves.count(True) == moves.count(False) > 0
    save_weights(model, rank, folder)


def ddp_worker(rank, folder, name):
    from torch.nn.parallel import DistributedDataParallel

    model = uneven_llama()
    wrapped = DistributedDataParallel(LossModule(model))
    optimizer = optimizer_of(model, **options_of(name))
    for step, tokens in enumerate(batches()):
        wrapped(tokens[rank * 2 : rank * 2 + 2], step).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_weights(model, rank, folder)


@pytest.mark.parametrize(
    ("worker", "name"),
    [
        (fsdp_worker, "plain"),
        (fsdp_worker, "momentum"),
        (fsdp_worker, "offloaded"),
        (ddp_worker, "plain"),
        (ddp_worker, "momentum"),
    ],
)
def test_two_processes_equal_one(tmp_path, worker, name):
    on_two_ranks(worker, tmp_path, name)
    model = uneven_llama()
    train(model, optimizer_of(model, **options_of(name)), 0, STEPS)
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt")["weights"]
        for parameter_name, param in model.named_parameters():
            torch.testing.assert_close(
                found[parameter_name],
                param.detach(),
                rtol=1e-4,
                atol=1e-4,
                msg=lambda text, n=parameter_name: f"{n}: {text}",
            )


def shares_worker(rank, folder, name):
    """The same gradients whole and cut, in any layout: the same update, each matrix whitened on one rank only."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    shapes = [(6, 10)] * 5 + [(5, 4)] * 3 + [(3, 9)]
    placements = [Shard(0)] * 5 + [Shard(1)] * 3 + [Replicate()]
    wholes = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    cut = []
    for param, placement in zip(wholes, placements, strict=True):
        param.grad = torch.randn_like(param)
        cut.append(torch.nn.Parameter(distribute_tensor(param.detach().clone(), mesh, [placement])))
        cut[-1].grad = distribute_tensor(param.grad, mesh, [placement])
    counted, reduced, redistributed = [], [], []
    whiten, reduce, redistribute = matrices.whitened, dist.all_reduce, DTensor.redistribute
    matrices.whitened = lambda x, *more: counted.append(len(x)) or whiten(x, *more)
    dist.all_reduce = lambda *args, **more: reduced.append(1) or reduce(*args, **more)
    DTensor.redistribute = lambda self, *args, **more: (
        redistributed.append(self.dtype) or redistribute(self, *args, **more)
    )
    SWAN(cut, whitening_dtype="float32").step()
    assert (len(reduced), len(redistributed)) == (1, 6)  # the flags of all; there and back for each of three batches
    del redistributed[:]
    lean = [torch.nn.Parameter(distribute_tensor(torch.randn(40, 64), mesh, [Shard(0)])) for _ in range(3)]
    for param in lean:
        param.grad = distribute_tensor(torch.randn(40, 64), mesh, [Shard(0)])
    taken = list(counted)
    SWAN(lean).step()
    assert redistributed == [torch.bfloat16] * 2
    matrices.whitened, dist.all_reduce, DTensor.redistribute = whiten, reduce, redistribute
    SWAN(wholes, whitening_dtype="float32").step()
    for sharded, param in zip(cut, wholes, strict=True):
        torch.testing.assert_close(sharded.detach().full_tensor(), param.detach(), rtol=1e-5, atol=1e-6)
    assert {str(p.placements) for p in cut} == {str((placement,)) for placement in placements}
    torch.save({"matrices": sum(taken)}, folder / f"rank{rank}.pt")


def test_the_work_is_shared_and_not_repeated(tmp_path):
    on_two_ranks(shares_worker, tmp_path, "")  # a failed assertion of a rank is raised here
    counts = [torch.load(tmp_path / f"rank{rank}.pt")["matrices"] for rank in range(2)]
    assert sum(counts) == 9
    assert max(counts) <= 6  # 3 + 2 of five, 2 + 1 of three, 1 + 0 of one


def not_finite_worker(rank, folder, name):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    params = [torch.nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(0)])) for _ in range(3)]
    for index, param in enumerate(params):
        gradient = torch.randn(4, 6, generator=torch.Generator().manual_seed(index))
        gradient[0, 0] = float("nan") if index == 1 else gradient[0, 0]  # on rank 0's piece only
        param.grad = distribute_tensor(gradient, mesh, [Shard(0)])
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("hf_sai").addHandler(handler)
    SWAN([(f"p{i}", param) for i, param in enumerate(params)], weight_decay=0.5).step()
    changed = [not torch.equal(param.detach().full_tensor(), torch.ones(4, 6)) for param in params]
    torch.save({"changed": changed, "messages": messages}, folder / f"rank{rank}.pt")


def test_a_gradient_that_is_not_finite_on_one_rank_is_left_alone_on_all(tmp_path):
    on_two_ranks(not_finite_worker, tmp_path, "")
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        assert found["changed"] == [True, False, True]
        assert [message.split(" has ")[0] for message in found["messages"]] == ["The gradient of p1"]


def refused_worker(rank, folder, name):
    """A sum that waits to be made, and what FSDP2 makes of a tensor that tensor parallelism has cut already."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    cut_twice = parallelize_module(torch.nn.Linear(6, 4), both["tensor"], ColwiseParallel())
    fully_shard(cut_twice, mesh=both["data"])
    summed = DTensor.from_local(torch.ones(4, 6), both["tensor"], [Partial()])
    for param, layout in ((cut_twice.weight, "_StridedShard"), (torch.nn.Parameter(summed), "Partial")):
        rule = "can gather DTensors that are sharded or replicated, but one lies as "
        message = (
            rf"^SWAN whitens whole matrices and {rule}\(.*{layout}\(.*; use FSDP2 without tensor parallelism for it$"
        )
        with pytest.raises(ShardingError, match=message):
            SWAN([param])
        optimizer = SWAN([torch.nn.Parameter(torch.ones(4, 6))])
        with pytest.raises(ShardingError, match=message):
            optimizer.add_param_group({"params": [param]})
        assert len(optimizer.param_groups) == 1
    # Adam takes the bias as it lies.
    cut_twice.bias.grad = torch.ones_like(cut_twice.bias)
    before = cut_twice.bias.detach().full_tensor()
    SWAN([cut_twice.bias], lr=0.1, weight_decay=0.0, adam_lr_ratio=1.0).step()
    torch.testing.assert_close(cut_twice.bias.detach().full_tensor(), before - 0.1)


def test_a_layout_that_cannot_be_gathered_is_refused_when_it_comes(tmp_path):
    on_two_ranks(refused_worker, tmp_path, "")
    assert dist.is_available()  # a failed assertion of a rank would have been raised above


def save_worker(rank, folder, name):
    model = shard(uneven_llama())
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, 5, rank)
    save(model, optimizer, folder / "checkpoint")


@fsdp_takes_the_mean
def test_saved_on_two_ranks_and_resumed_on_one(tmp_path):
    on_two_ranks(save_worker, tmp_path, "")
    expected = uneven_llama()
    train(expected, optimizer_of(expected), 0, STEPS)
    model, optimizer = load_into_new(optimizer_of, tmp_path / "checkpoint")
    train(model, optimizer, 5, STEPS)
    for (name, param), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
