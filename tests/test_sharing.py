"""SWAN's work shared under DDP: each matrix is whitened once, and weights are the same on every rank to the bit."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.distributed import STEPS, LossModule, batches, train, uneven_llama
from support.processes import free_port
from torch.nn.parallel import DistributedDataParallel

import hf_sai
from hf_sai.optim import SWAN, sharing


def start(rank, port, worker, folder, given, size):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    worker(rank, Path(folder), given)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def on_ranks(size, worker, folder, given):
    """What each rank's `worker(rank, folder, given)` saved in `folder`; a failed assertion of one is raised here."""
    mp.spawn(start, args=(free_port(), worker, str(folder), given, size), nprocs=size, join=True)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(size)]


def optimizer_of(model, **options):
    return SWAN(hf_sai.param_groups(model, "swan", weight_decay=0.1), lr=1e-3, **options)


def weights_of(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def equal_to_the_bit(found):
    return all(torch.equal(value, other[name]) for other in found[1:] for name, value in found[0].items())


def built(kind):
    model = uneven_llama()
    if kind == "frozen":
        model.model.layers[0].mlp.requires_grad_(False)
    if kind == "unused":
        model.spare = torch.nn.Linear(6, 4)
    return model


def one_process(kind, options):
    model = built(kind)
    train(model, optimizer_of(model, **options), 0, STEPS)
    return weights_of(model)


def shared_run(rank, folder, kind, options):
    """Training with the rows of each batch shared out."""
    model = built(kind)
    wrapped = DistributedDataParallel(LossModule(model), find_unused_parameters=kind == "unused")
    optimizer = optimizer_of(model, share_whitening=True, **options)
    first, rows = 0, 4 // dist.get_world_size()
    if kind == "resumed":
        saved = torch.load(folder / "saved.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = 5
    for step, tokens in list(enumerate(batches()))[first:]:
        if kind == "late" and rank == 1:
            time.sleep(0.05)
        mine = tokens[rank * rows : (rank + 1) * rows]
        if kind == "accumulated":
            with wrapped.no_sync():
                (wrapped(mine[:1], step) / 2).backward()
            (wrapped(mine[-1:], step) / 2).backward()  # on four ranks the same row again
        else:
            wrapped(mine, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model)


# Runs of ten steps, each as it is on one process: (kind, options).
RUNS = [("plain", {}), ("plain", {"momentum": 0.9}), ("plain", {"whitening": "newton_schulz"}), ("late", {})]
RUNS += [("frozen", {}), ("unused", {}), ("accumulated", {}), ("resumed", {})]


def training_worker(rank, folder, runs):
    torch.save([shared_run(rank, folder, kind, options) for kind, options in runs], folder / f"rank{rank}.pt")


@pytest.mark.parametrize(("size", "runs"), [(2, RUNS), (4, [RUNS[0], *RUNS[3:]])])
def test_ranks_are_equal_to_the_bit_and_to_one_process(tmp_path, size, runs):
    model = uneven_llama()
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, 5)  # "resumed" goes on from here, on more ranks
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    found = on_ranks(size, training_worker, tmp_path, runs)
    for index, (kind, options) in enumerate(runs):
        assert equal_to_the_bit([each[index] for each in found]), kind
        for name, expected in one_process(kind, options).items():
            torch.testing.assert_close(
                found[0][index][name],
                expected,
                rtol=1e-4,
                atol=1e-4,
                msg=lambda text, where=f"{kind} {options} {name}": f"{where}: {text}",
            )


# ---- The same gradients on all ranks: what is whitened where, what is sent ----

SHAPES = [(40, 64)] * 5 + [(64, 40)] * 3 + [(16, 16)] * 2 + [(6, 3, 5)]
# Of updates: bfloat16 where the smaller side is over 32.
BYTES = sum(math.prod(shape) * (2 if min(shape) > 32 else 4) for shape in SHAPES)


def parameters(dtype="float32"):
    torch.manual_seed(3)
    params = [torch.nn.Parameter(torch.randn(shape).to(getattr(torch, dtype))) for shape in SHAPES]
    for param in params:
        param.grad = torch.randn(param.shape).to(param.dtype)
    return params


def counted(options, dtype="float32", bad=None, round_bytes=sharing.CPU_ROUND_BYTES):
    """Two steps, and what the second of them sent and whitened."""
    sent, reduced, whitened = [], [], []
    gather, reduce, whiten = sharing.all_gather, dist.all_reduce, sharing.whiten
    whole_round = sharing.CPU_ROUND_BYTES
    params = parameters(dtype)
    optimizer = SWAN(params, share_whitening=True, weight_decay=0.5, **options)
    optimizer.step()  # the ranks compare their gradients
    before = [param.detach().clone() for param in params]
    if bad is not None:
        params[bad].grad[0, 0] = math.nan
    sharing.all_gather = lambda out, mine, **more: sent.append(mine.nbytes) or gather(out, mine, **more)
    dist.all_reduce = lambda *args, **more: reduced.append(1) or reduce(*args, **more)
    sharing.whiten = lambda batch: whitened.extend(batch.matrices) or whiten(batch)
    sharing.CPU_ROUND_BYTES = round_bytes
    optimizer.step()
    sharing.all_gather, dist.all_reduce, sharing.whiten = gather, reduce, whiten
    sharing.CPU_ROUND_BYTES = whole_round
    moved = [not torch.equal(param, old) for param, old in zip(params, before, strict=True)]
    found = {"weights": {index: param.detach() for index, param in enumerate(params)}, "sent": sent, "moved": moved}
    return {**found, "whitened": len(whitened), "reduced": len(reduced)}


ROUND = 8000
STEPPED = [{}, {"momentum": 0.5}, {"whitening_dtype": "float32"}, {"maximize": True}]


def counting_worker(rank, folder, _):
    found = {f"options {index}": counted(options) for index, options in enumerate(STEPPED)}
    found["bfloat16"] = counted({}, dtype="bfloat16")
    found["many rounds"] = counted({}, round_bytes=ROUND * dist.get_world_size())
    found["bad"] = counted({}, bad=2)
    torch.save(found, folder / f"rank{rank}.pt")


@pytest.fixture(scope="module", params=[2, 4])
def steps(request, tmp_path_factory):
    return on_ranks(request.param, counting_worker, tmp_path_factory.mktemp("ranks"), None)


def test_equal_gradients_give_what_one_process_gives(steps):
    cases = [(f"options {index}", options, "float32") for index, options in enumerate(STEPPED)]
    for name, options, dtype in [*cases, ("bfloat16", {}, "bfloat16"), ("many rounds", {}, "float32")]:
        found = [each[name] for each in steps]
        assert equal_to_the_bit([each["weights"] for each in found])
        assert sum(each["whitened"] for each in found) == len(SHAPES)  # each on one rank only
        assert max(each["whitened"] for each in found) < len(SHAPES)
        params = parameters(dtype)
        alone = SWAN(params, weight_decay=0.5, **options)
        alone.step()
        alone.step()
        for index, param in enumerate(params):
            torch.testing.assert_close(found[0]["weights"][index], param.detach(), rtol=1e-4, atol=1e-4)


def test_two_bytes_a_parameter_are_gathered_at_once_and_nothing_else_is(steps):
    for each in steps:
        found, ranks = each["options 0"], len(steps)
        assert (len(found["sent"]), found["reduced"]) == (1, 0)
        # This rank's updates, padded to the largest share; and a factor for each.
        assert BYTES / ranks <= sum(found["sent"]) <= 1.4 * BYTES / ranks + 8 * len(SHAPES)
        rounds = each["many rounds"]["sent"]
        assert len(rounds) > 1
        assert max(rounds) < ROUND + 40 * 64 * 2 + 64
        assert sum(rounds) <= 1.7 * BYTES / ranks + 8 * len(SHAPES)


def test_a_gradient_that_is_not_finite_leaves_its_matrix_alone_on_all_ranks(steps):
    assert equal_to_the_bit([each["bad"]["weights"] for each in steps])
    for each in steps:
        assert each["bad"]["moved"] == [index != 2 for index in range(len(SHAPES))]


def unequal_worker(rank, folder, _):
    params = parameters()
    for param in params:
        param.grad *= 1.0 + rank
    with pytest.raises(RuntimeError, match="share_whitening=True needs equal gradients on all ranks"):
        SWAN(params, share_whitening=True).step()
    calls = []
    gather = sharing.all_gather
    sharing.all_gather = lambda *args, **more: calls.append(1) or gather(*args, **more)
    SWAN(params).step()  # a plain loop is not shared unless it is asked for
    torch.save({"calls": len(calls)}, folder / f"rank{rank}.pt")


def test_ranks_out_of_step_are_told_and_a_plain_loop_shares_nothing(tmp_path):
    assert on_ranks(2, unequal_worker, tmp_path, None) == [{"calls": 0}] * 2


# ---- The plan ----


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_the_work_is_shared_out_by_operations(ranks):
    generator = torch.Generator().manual_seed(ranks)
    costs = torch.rand(40, generator=generator).pow(3).mul(100).tolist()
    shares = sharing.share_out(costs, ranks)
    assert sorted(index for share in shares for index in share) == list(range(40))
    loads = [sum(costs[index] for index in share) for share in shares]
    assert max(loads) <= 4 / 3 * max(sum(costs) / ranks, max(costs))


@pytest.mark.parametrize("bound", [1, 700, 10**9])
def test_every_matrix_is_in_one_round(bound):
    numels = [100 * (1 + index % 7) for index in range(30)]
    shares = sharing.share_out([float(numel) for numel in numels], 3)
    rounds = sharing.rounds_of(numels, shares, bound)
    for rank, share in enumerate(shares):
        assert [index for each in rounds for index in each[rank]] == share
    largest = max(sum(numels[index] for index in each) for one in rounds for each in one)
    assert largest <= max(bound + 700, 2 * 700) if bound > 1 else largest <= 2 * 700


def test_a_wide_matrix_costs_its_smaller_side_squared():
    from hf_sai.optim.matrices import Matrix
    from hf_sai.optim.routing import layout_of

    def cost(shape, route="matrix"):
        return sharing.cost_of(Matrix({}, "m", torch.zeros(shape), torch.zeros(shape), layout_of(route)))

    assert cost((8, 20)) == cost((20, 8)) == 8 * 8 * 20
    assert cost((8, 4, 5)) == 8 * 8 * 20
    assert cost((3, 8, 20), "matrices") == 3 * 8 * 8 * 20
    assert cost((10, 24), "matrix, transposed, in 3 parts") == 3 * 8 * 8 * 10


def test_a_trainer_shares_under_ddp_only(monkeypatch):
    from types import SimpleNamespace

    from hf_sai.live import under_ddp

    def args(mode, **more):
        return SimpleNamespace(parallel_mode=SimpleNamespace(value=mode), **more)

    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert under_ddp(args("distributed"))
    assert not under_ddp(args("not_parallel"))
    assert not under_ddp(args("not_distributed"))  # nn.DataParallel: one process
    assert not under_ddp(args("distributed", fsdp="full_shard"))
    assert not under_ddp(args("distributed", deepspeed="zero.json"))
    assert not under_ddp(args("distributed", parallelism_config=object()))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not under_ddp(args("distributed"))


def test_the_choice_is_kept_out_of_the_groups_and_refused_where_it_is_none():
    param = torch.nn.Parameter(torch.zeros(3, 4))
    optimizer = SWAN([param], share_whitening=True)
    assert "share_whitening" not in optimizer.param_groups[0]
    param.grad = torch.randn(3, 4)
    optimizer.step()  # one process has nobody to share with
    assert param.detach().abs().max() > 0
    with pytest.raises(ValueError, match="share_whitening must be True or False but is 'perhaps'"):
        SWAN([param], share_whitening="perhaps")
