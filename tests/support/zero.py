"""Runs under DeepSpeed on processes that a test starts: a model, its one-process run, and DeepSpeed's engine."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hf_sai import SWAN, SGDSaI
from support.processes import free_port


STEPS = 6
VOCABULARY = 32


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(18)
        self.up = torch.nn.Linear(18, 30, bias=False)
        self.down = torch.nn.Linear(30, 18)

    def forward(self, hidden):
        return hidden + self.down(torch.nn.functional.silu(self.up(self.norm(hidden))))


class Uneven(torch.nn.Module):
    """Sizes that no number of ranks shares evenly, one element, a part without gradient at first, and a frozen one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(VOCABULARY, 18)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(3))
        self.head = torch.nn.Linear(18, VOCABULARY, bias=False)
        self.odd = torch.nn.Linear(3, 5)
        self.late = torch.nn.Parameter(torch.zeros(7))
        self.gain = torch.nn.Parameter(torch.ones(1))
        self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, tokens, step):
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        found = self.head(hidden)[:, :-1].float().flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(found, tokens[:, 1:].flatten()) * self.gain
        loss = loss + self.odd((tokens[:, :3] / 32).to(self.odd.weight.dtype)).square().mean()
        late = (self.late * torch.arange(7.0, dtype=self.late.dtype, device=self.late.device)).sum()
        return (loss + late * (1e-2 if step >= 2 else 0.0)).squeeze()


def batches(accumulate, steps=STEPS):
    generator = torch.Generator().manual_seed(11)
    return [
        [torch.randint(0, VOCABULARY, (4, 10), generator=generator) for _ in range(accumulate)] for _ in range(steps)
    ]


def groups_of(model):
    """Frozen tensors too, as loops that take all of a model have them."""
    decay = [(n, p) for n, p in model.named_parameters() if len(getattr(p, "ds_shape", p.shape)) >= 2]
    rest = [(n, p) for n, p in model.named_parameters() if len(getattr(p, "ds_shape", p.shape)) < 2]
    return [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


def sgd_sai(model, normalize="none", **options):
    lr = {"none": 0.02, "max": 0.5, "rms": 0.01}[normalize]
    return SGDSaI(groups_of(model), lr=lr, normalize=normalize, **options)


def swan(model, **options):
    """Matrices of the blocks are whitened, and `odd`, with another shape; the rest is Adam's."""
    groups = []
    for kind in ("swan", "adam"):
        named = [
            (n, p)
            for n, p in model.named_parameters()
            if (len(getattr(p, "ds_shape", p.shape)) == 2 and n not in ("embed.weight", "head.weight"))
            == (kind == "swan")
        ]
        routes = ["matrix" if kind == "swan" else "adam"] * len(named)
        groups.append({"params": named, "kind": kind, "weight_decay": 0.1, "routes": routes})
    return SWAN(groups, lr=2e-3, **{"whitening_dtype": "float32", **options})


def one_process(make, accumulate=1, clip=0.0, steps=STEPS, dtype=torch.float32):
    model = Uneven().to(dtype)
    optimizer = make(model)
    for step, micro in enumerate(batches(accumulate, steps)):
        for tokens in micro:
            (model(tokens, step) / accumulate).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach() for n, p in model.named_parameters()}, optimizer


def configuration(stage, accumulate=1, clip=0.0, **zero):
    """DeepSpeed's, for four rows a step in all."""
    more = {key: zero.pop(key) for key in ("bf16", "data_types") if key in zero}
    return {
        "train_micro_batch_size_per_gpu": 4 // dist.get_world_size(),
        "gradient_accumulation_steps": accumulate,
        "train_batch_size": 4 * accumulate,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
        "steps_per_print": 10**9,
        **more,
    }


def build(make, config, init=False):
    """Engine, model and optimizer."""
    import deepspeed

    if init:
        source = {n: p.detach().clone() for n, p in Uneven().named_parameters()}
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = Uneven()
        for name, param in model.named_parameters():
            with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
                if dist.get_rank() == 0:
                    param.data.copy_(source[name])
    else:
        model = Uneven()
    optimizer = make(model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(config))
    return engine, model, optimizer


def run(engine, first, last, accumulate=1, steps=STEPS):
    rank, per_rank = dist.get_rank(), 4 // dist.get_world_size()
    for step, micro in enumerate(batches(accumulate, steps)):
        if first <= step < last:
            for tokens in micro:
                engine.backward(engine(tokens[rank * per_rank : (rank + 1) * per_rank], step))
                engine.step()


def weights_of(model, stage):
    import deepspeed

    found = {}
    for name, param in model.named_parameters():
        gather = deepspeed.zero.GatheredParameters([param]) if stage == 3 else contextlib.nullcontext()
        with gather:
            found[name] = param.detach().clone().float()
    return found


def case(folder, make, stage, accumulate=1, clip=0.0, resume=0, init=False, **zero):
    """A run of `STEPS` steps; what this rank has at its end."""
    config = configuration(stage, accumulate, clip, **zero)
    engine, model, optimizer = build(make, config, init)
    if resume:
        run(engine, 0, resume, accumulate)
        engine.save_checkpoint(str(folder), tag="saved")
        torch.manual_seed(77)
        engine, model, optimizer = build(make, config, init)
        engine.load_checkpoint(str(folder), tag="saved")
    run(engine, resume, STEPS, accumulate)
    rows = optimizer.gsnr_statistics() if hasattr(optimizer, "gsnr_statistics") else []
    taken = optimizer._taken_over()
    if taken is not None:
        taken.write()  # as state_dict() does, which stage 3 calls with groups that it has filled for it
    saved = [group.get("tensors") for group in optimizer._every_group()]
    key = "momentum_buffer" if isinstance(optimizer, SGDSaI) else "exp_avg"
    kept = stage and optimizer.param_groups[0]["momentum" if isinstance(optimizer, SGDSaI) else "eps"]
    return {
        "weights": weights_of(model, stage),
        "rows": rows,
        "saved": saved,
        "buffer": full_state(dict(model.named_parameters())["odd.bias"], key) if kept else None,
        "wrapper": type(engine.optimizer).__name__,
    }


def full_state(param, key):
    """A tensor of the optimizer's state, as DeepSpeed finds it; collective."""
    from deepspeed.utils import safe_get_full_optimizer_state

    return safe_get_full_optimizer_state(param, key).clone()


def cases_of(folder, stage, cases):
    """Several runs of one stage, one after the other: `{name: (make, settings)}`."""
    found = {}
    for name, (make, settings) in cases.items():
        (folder / name).mkdir(exist_ok=True)
        found[name] = case(folder / name, make, stage, **settings)
    return found


def start(rank, ranks, port, worker, folder, args):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
    )
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(280, exit=True)  # where a rank waits for one that is gone
    import deepspeed

    # A C++ extension that it would compile, under a lock that outlives a process. (The name is not that of torch.)
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.init_distributed("gloo", verbose=False)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    found = worker(Path(folder), *args)
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.barrier()  # a rank that leaves while the other still talks makes gloo abort
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads are torn down in any order at exit, and under load one then aborts the process


def on_ranks(ranks, worker, folder, *args):
    """What `worker(folder, *args)` gives on each rank."""
    mp.spawn(start, args=(ranks, free_port(), worker, str(folder), args), nprocs=ranks, join=True)
    return [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]
