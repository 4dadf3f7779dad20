"""
hf_sai on an accelerator: one command, under 8 minutes, one JSON file and a table. Needs no network.

    python benchmarks/gpu.py                        # one CUDA card of 40 GB or more
    python benchmarks/gpu.py --device cpu --tiny    # every line in a minute or two; its times mean nothing
    python benchmarks/gpu.py --only speed sync      # some sections

Sections: parity (values by dtype and path against a float64 formula), rounding (bf16 that stalls), sync (host waits),
resume (through the CPU), flags (a host that runs ahead), scaler (GradScaler), offload (state on the CPU between
steps), real (a model's step, and memory against `hf-sai memory`), trainer, speed (against torch's fused optimizers,
and launches), graph (torch.compile and CUDA graphs). The exit status is 1 where a check failed. Results are written
after every section, to `benchmarks/results/gpu_<device>.json` and `.md`.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import command, machine, write_results
from gpu_parts import (
    MAKERS,
    NOT_CLIPPED,
    Checks,
    Device,
    clock,
    launches,
    llama,
    saved_and_mapped,
    state_devices,
    swan,
    tables,
    twins,
    waits,
    worst_relative,
)
from torch import nn

import hf_sai
from hf_sai.memory import memory_rows
from hf_sai.model_build import shapes_of
from hf_sai.optim.whitening import swan_direction


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
Result = tuple[bool, dict[str, Any]]


class Acceptance:
    """
    All sections, on one device.

    Args:
        where (`Device`): The device.
        budget (`float`): Seconds after which no section begins, and no row of the speed table.
    """

    def __init__(self, where: Device, budget: float) -> None:
        self.where, self.checks, self.begun, self.budget = where, Checks(), time.perf_counter(), budget
        self.speeds: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}

    @property
    def late(self) -> bool:
        """Whether the budget is spent."""
        return time.perf_counter() - self.begun > self.budget

    def each(
        self,
        title: str,
        function: Callable[[str, torch.dtype], Result],
        names: Sequence[str],
        dtypes: Sequence[torch.dtype] = (F32, BF16),
    ) -> None:
        """One check for each name and dtype."""
        for name in names:
            for dtype in dtypes:
                self.checks.attempt(f"{title} {name} {str(dtype)[6:]}", function, name, dtype)

    def section(self, name: str) -> Result:
        """All of one."""
        getattr(self, name)()
        return True, {}

    # ---- values ----

    def parity(self) -> None:
        """Five steps beside a float64 formula that shares no code with the library; whitening beside SVD."""
        paths = ("sgd_sai", "sgd_sai no kernel", "sgd_sai per tensor", "sgd_sai kahan", "sgd_sai lr tensor")
        self.each("parity", self._five_steps, paths, (F32, BF16, F16))
        self.each("parity", self._directions, ("swan_direction",), (F32, BF16, F16))

    def _five_steps(self, name: str, dtype: torch.dtype) -> Result:
        torch.manual_seed(0)
        large = 64 if self.where.tiny else 2048
        start = [torch.randn(s).to(dtype) for s in [(64, 48), (large, 1025), (7,), (33, 3, 3, 3)]]
        params = [(f"p{i}", nn.Parameter(t.to(self.where.device))) for i, t in enumerate(start)]
        reference, scales, means = [t.double() for t in start], [], []
        optimizer = MAKERS[name](params)
        for step in range(5):
            for _, param in params:
                param.grad = (torch.randn(param.shape) * 1e-2).to(self.where.device, dtype)
            optimizer.step()
            grads = [param.grad.cpu().double() for _, param in params if param.grad is not None]
            if step == 0:
                scales, means = [(g.norm() / (g.std() + 1e-8)).item() for g in grads], grads
            else:
                means = [0.9 * m + 0.1 * g for m, g in zip(means, grads, strict=True)]
            moves = [1e-2 * scale * m for scale, m in zip(scales, means, strict=True)]
            reference = [r * (1 - 1e-4) - move for r, move in zip(reference, moves, strict=True)]
        pairs = zip(params, reference, strict=True)
        errors = [((p.detach().cpu().double() - r).abs() / (1 + r.abs())).max().item() for (_, p), r in pairs]
        worst = max(errors) / torch.finfo(dtype).eps
        return worst < (32 if dtype == F32 else 8), {"worst_error_in_eps": round(worst, 2)}

    def _directions(self, _: str, dtype: torch.dtype) -> Result:
        torch.manual_seed(0)
        facts, ok = {}, True
        for gradient in (torch.randn(3, 64, 48).to(dtype), torch.randn(2, 96, 256).to(dtype)):
            exact = swan_direction(gradient.double(), "svd")
            for method, kind, least in (
                ("svd", F32, 0.9999),
                ("newton_schulz", F32, 0.97),
                ("polar_express", F32, 0.995),
                ("polar_express", BF16, 0.98),
            ):
                found = swan_direction(gradient.to(self.where.device), method, None, kind).cpu().double()
                cosine = torch.cosine_similarity(found.flatten(), exact.flatten(), 0).item()
                facts[f"{method} {str(kind)[6:]} {tuple(gradient.shape)}"] = round(cosine, 5)
                ok = ok and cosine > least
        constant = torch.ones(1, 16, 32, device=self.where.device, dtype=dtype)
        return ok and not swan_direction(constant).any().item(), facts

    def rounding(self) -> None:
        """Replicas with other random numbers round alike; bf16 that stalls moves with either of the two ways."""
        self.checks.attempt("rounding: replicas are equal", self._replicas)
        for name in ("sgd_sai stochastic", "sgd_sai kahan"):
            self.checks.attempt(f"rounding: {name} moves what bf16 loses", self._moves, name)

    def _replicas(self) -> Result:
        named = self.where.parameters("lora", BF16)
        other = twins(named)
        for seed, each in ((1, named), (2, other)):
            optimizer = MAKERS["sgd_sai stochastic"](each)
            torch.manual_seed(seed)
            for _ in range(3):
                optimizer.step()
        return all(torch.equal(p, q) for (_, p), (_, q) in zip(named, other, strict=True)), {}

    def _moves(self, name: str) -> Result:
        moved = {}
        for each in ("sgd_sai", name):
            param = nn.Parameter(torch.ones(4096, device=self.where.device, dtype=BF16))
            optimizer = MAKERS[each]([("p", param)])
            optimizer.param_groups[0].update(lr=2e-6, weight_decay=0.0)
            for _ in range(50):
                param.grad = torch.linspace(0.5, 1.5, 4096, device=self.where.device).to(BF16)
                optimizer.step()
            moved[each] = 1.0 - param.float().mean().item()
        scale = optimizer.state[param]["gsnr"]
        expected = 50 * 2e-6 * scale
        return moved["sgd_sai"] == 0.0 and abs(moved[name] / expected - 1) < 0.1, {**moved, "expected": expected}

    # ---- the host ----

    def sync(self) -> None:
        """How often the host waits in a first and in a steady step."""
        names = [name for name in MAKERS if name not in ("torch sgd fused", "torch muon", NOT_CLIPPED)]
        self.each("sync", self._syncs, names)

    def _syncs(self, name: str, dtype: torch.dtype) -> Result:
        named = self.where.parameters("lora" if "paired" in name else "gpt2", dtype)
        optimizer, params = MAKERS[name](named), [param for _, param in named]

        def clipped() -> None:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()

        first = waits(self.where, optimizer.step)
        optimizer.step()
        self.where.synchronize()
        facts = {"first": first, "clipped": waits(self.where, clipped), "steady": waits(self.where, optimizer.step)}
        waits(self.where, optimizer.step, "error")
        return not (facts["steady"] and self.where.is_cuda), facts  # SWAN on the CPU reads its flags at once

    def resume(self) -> None:
        """A checkpoint mapped to the CPU goes on where it was, with all state on the device."""
        self.each(
            "resume", self._resumed, ("sgd_sai", "sgd_sai stochastic", "sgd_sai kahan", "sgd_sai lr tensor", "swan")
        )

    def _resumed(self, name: str, dtype: torch.dtype) -> Result:
        named = self.where.parameters("gpt2", dtype)
        optimizer = MAKERS[name](named)
        optimizer.step()
        optimizer.step()
        other_named = twins(named)
        other = MAKERS[name](other_named)
        other.load_state_dict(saved_and_mapped(optimizer))
        places = state_devices(other)
        optimizer.step()
        other.step()
        equal = all(torch.equal(p, q) for (_, p), (_, q) in zip(named, other_named, strict=True))
        return equal and len(places) == 1, {"devices": places}

    def flags(self) -> None:
        """A host that runs far ahead of the device must not read SWAN's flags before they are written."""
        self.checks.attempt("swan reads no flag too early, and tells of the true ones", self._ahead)

    def _ahead(self) -> Result:
        told: list[str] = []
        logger = logging.getLogger("hf_sai.optim.base")
        note = lambda record: told.append(record.getMessage()[:100]) or True  # noqa: E731
        logger.addFilter(note)
        try:
            named = self.where.parameters("gpt2", F32)
            optimizer = swan(named)
            optimizer.step()
            self.where.synchronize()
            for size in (8, 64, 512) * 64:  # pinned memory that is used again, and holds False
                torch.zeros(size, dtype=torch.bool, pin_memory=self.where.is_cuda)
            if self.where.is_cuda:
                torch.cuda._sleep(int(2e9))
            for _ in range(3):
                optimizer.step()
            early = list(told)
            gradient = named[0][1].grad
            assert gradient is not None
            gradient.view(-1)[0] = torch.inf
            optimizer.step()
            self.where.synchronize()
            optimizer.step()
        finally:
            logger.removeFilter(note)
        return not early and len(told) == 1, {"early": early[:2], "told": told[:2]}

    def scaler(self) -> None:
        """Training in float16 under autocast with a GradScaler, through steps that it skips."""
        self.checks.attempt("GradScaler sgd_sai", self._scaled, "sgd_sai")
        self.checks.attempt("GradScaler swan", self._scaled, "swan")

    def _scaled(self, name: str) -> Result:
        torch.manual_seed(0)
        kind, device = self.where.device.type, self.where.device
        model, losses = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).to(device), []
        optimizer = hf_sai.create_optimizer(name, model, lr=1e-2 if name == "sgd_sai" else 1e-3)
        scaler = torch.amp.GradScaler(kind, init_scale=2.0 ** (26 if self.where.is_cuda else 8))
        x = torch.randn(64, 16, device=device)
        for _ in range(40):
            with torch.autocast(kind, dtype=F16 if self.where.is_cuda else BF16):
                loss = (model(x) - x).float().square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.item())
        finite = all(bool(param.isfinite().all()) for param in model.parameters())
        return losses[-1] < losses[0] and finite, {"losses": losses[::13], "scale": scaler.get_scale()}

    def offload(self) -> None:
        """The state goes to the CPU between steps and comes back, as generation in an RL loop wants the memory."""
        self.each("offload", self._offloaded, ("sgd_sai", "swan"))

    def _offloaded(self, name: str, dtype: torch.dtype) -> Result:
        named = self.where.parameters("gpt2", dtype)
        other_named = twins(named)
        optimizer, other = MAKERS[name](named), MAKERS[name](other_named)
        for _ in range(3):
            optimizer.step()
            other.step()
            for place in ("cpu", self.where.device):
                for state in other.state.values():
                    moved = {key: v.to(place) for key, v in state.items() if isinstance(v, torch.Tensor)}
                    state.update(moved)
        return all(torch.equal(p, q) for (_, p), (_, q) in zip(named, other_named, strict=True)), {}

    def graph(self) -> None:
        """torch.compile of the step, and a CUDA graph of it."""
        backend = "eager" if self.where.tiny else "inductor"
        compiled = lambda optimizer: torch.compile(optimizer.step, backend=backend)  # noqa: E731
        self.each("torch.compile", lambda n, d: self._wrapped(n, compiled, d), ("sgd_sai", "swan"))
        self.each("CUDA graph", lambda n, d: self._wrapped(n, self._captured, d), ("sgd_sai lr tensor",))

    def _captured(self, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        if not self.where.is_cuda:
            return optimizer.step
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()  # a capture runs nothing
        return graph.replay

    def _wrapped(self, name: str, wrap: Callable[[Any], Callable[[], Any]], dtype: torch.dtype) -> Result:
        named = self.where.parameters("gpt2", dtype)[-14:]
        other_named = twins(named)
        one, two = MAKERS[name](named), MAKERS[name](other_named)
        for _ in range(2):
            one.step()
            two.step()
        self.where.synchronize()
        step = wrap(one)
        for _ in range(3):
            step()
            two.step()
        worst = worst_relative(named, other_named)
        return worst < (1e-5 if dtype == F32 else 2e-2), {"worst_relative": worst}

    # ---- time and memory ----

    def speed(self) -> None:
        """A step of each optimizer on the tensors of each model, after clipping, as a Trainer makes it."""
        for kind in ("gpt2", "lora", "8b layers", "1.5b"):
            for dtype in (F32, BF16):
                title = f"{kind} {str(dtype)[6:]}"
                rows = self.speeds[title] = {}
                for name in MAKERS:
                    if ("paired" in name) > (kind == "lora") or (name == "torch muon" and kind == "lora"):
                        continue
                    if self.late:
                        self.checks.add(f"speed {title} {name}", False, error="left out: no time")
                        return
                    try:
                        rows[name] = self._row(title, kind, name, dtype)
                    except Exception as error:
                        rows[name] = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
                base = rows["torch sgd fused"].get("ms", float("nan"))
                for row in rows.values():
                    row["over_fused_sgd"] = round(row["ms"] / base, 3) if "ms" in row else None
                ratio = rows["sgd_sai"]["over_fused_sgd"]
                good = self.where.tiny or (ratio is not None and ratio <= 1.15)
                self.checks.add(f"speed sgd_sai <= 1.15 x fused SGD, {title}", good, ratio=ratio)

    def _row(self, title: str, kind: str, name: str, dtype: torch.dtype) -> dict[str, Any]:
        named = self.where.parameters(kind, dtype)
        optimizer = MAKERS[name](named)
        if name != NOT_CLIPPED:
            torch.nn.utils.clip_grad_norm_([param for _, param in named], math.inf)
        self.where.synchronize()
        begun = time.perf_counter()
        optimizer.step()
        self.where.synchronize()
        row: dict[str, Any] = {"first_ms": round((time.perf_counter() - begun) * 1e3, 1)}
        row |= {key: round(value, 3) for key, value in clock(self.where, optimizer.step, 10).items()}
        row["launches"] = launches(self.where, optimizer.step)
        if name == "swan":
            bound = optimizer.whitening_bytes()  # type: ignore[attr-defined]
            fits = row["extra_bytes"] <= 1.1 * bound + 2**28
            self.checks.add(f"whitening_bytes {title}", fits, measured=row["extra_bytes"], bound=bound)
        return row

    def real(self) -> None:
        """Share of the step in training a 370M LLaMA in bf16 on 8192 tokens; memory beside what hf_sai says of it."""
        for name in ("sgd_sai", "swan", "adamw"):
            self.checks.attempt(f"real {name}", self._trained, name)

    def _trained(self, name: str) -> Result:
        where = self.where
        with torch.device("meta"):
            row = memory_rows(shapes_of(llama(where.tiny, BF16)), [name])[0]
        before, model = where.allocated(), llama(where.tiny, BF16).to(where.device)
        if name == "adamw":
            optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        else:
            optimizer = hf_sai.create_optimizer(name, model, lr=1e-4)
        ids = torch.randint(1, 100, (2, 16) if where.tiny else (8, 1024), device=where.device)

        def backward() -> None:
            model(input_ids=ids, labels=ids).loss.backward()

        backward()
        optimizer.step()
        where.synchronize()
        kept, predicted = where.allocated() - before, row.weights + row.gradients + row.state
        step, passes = clock(where, optimizer.step, 8), clock(where, backward, 5)
        fits = 0.9 < kept / predicted < 1.2 and step["extra_bytes"] <= 1.15 * row.extra + 2**26
        facts = {"step": step, "pass_ms": passes["ms"], "share": round(step["ms"] / (step["ms"] + passes["ms"]), 3)}
        facts |= {"kept": kept, "kept_predicted": predicted, "extra_predicted": row.extra}
        return fits or not where.is_cuda, facts

    def trainer(self) -> None:
        """The Trainer trains, writes the report, and resumes to the same weights."""
        self.checks.attempt("Trainer optim=sgd_sai, resumed", self._with_trainer, "sgd_sai", 1e-2)
        self.checks.attempt("Trainer optim=swan, resumed", self._with_trainer, "swan", 1e-3)

    def _with_trainer(self, name: str, lr: float) -> Result:
        with tempfile.TemporaryDirectory() as folder:
            whole, losses = self._run_trainer(folder, name, lr, None)
            again, _ = self._run_trainer(folder, name, lr, str(Path(folder) / "checkpoint-4"))
            report = (Path(folder) / "gsnr_report.json").is_file()
        worst = max((a - b).abs().max().item() for a, b in zip(whole, again, strict=True))
        good = report and losses[-1] < losses[0] and worst < 1e-6
        return good, {"losses": losses[::3], "resumed_differs_by": worst, "report": report}

    def _run_trainer(self, folder: str, name: str, lr: float, checkpoint: str | None) -> tuple[list[Any], list[float]]:
        from transformers import TrainingArguments

        data = [{"input_ids": torch.arange(i, i + 16), "labels": torch.arange(i, i + 16)} for i in range(64)]
        settings: dict[str, Any] = {
            "max_steps": 8,
            "save_steps": 4,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
        }
        settings |= {"use_cpu": not self.where.is_cuda, "bf16": self.where.is_cuda, "report_to": [], "seed": 1}
        args = TrainingArguments(folder, optim=name, learning_rate=lr, disable_tqdm=True, **settings)
        made = hf_sai.SaITrainer(llama(True, F32), args, train_dataset=data)
        made.train(resume_from_checkpoint=checkpoint)
        losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
        return [param.detach().cpu().clone() for param in made.model.parameters()], losses


SECTIONS = ("parity", "rounding", "sync", "resume", "flags", "scaler", "offload", "real", "trainer", "speed", "graph")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the sections, writes after each, and exits with 1 where a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that prove only that every line runs")
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=SECTIONS, metavar="SECTION")
    parser.add_argument("--budget", type=float, default=440.0, help="seconds after which no section begins")
    args = parser.parse_args(argv)
    acceptance = Acceptance(Device(args.device, args.tiny), args.budget)
    name = f"gpu_{args.device.partition(':')[0]}{'_tiny' if args.tiny else ''}"
    for section in SECTIONS:
        if section not in args.only:
            continue
        begun = time.perf_counter()
        if acceptance.late:
            acceptance.checks.add(f"section {section}", False, error="left out: no time")
        else:
            acceptance.checks.attempt(f"section {section}", acceptance.section, section)
        acceptance.seconds[section] = round(time.perf_counter() - begun, 1)
        results = {"machine": machine("transformers"), "command": command(__file__, argv)}
        results |= {"checks": acceptance.checks.rows, "seconds": acceptance.seconds, "speed": acceptance.speeds}
        write_results(name, results, tables(acceptance.checks, acceptance.speeds))
    failed = acceptance.checks.failed
    count = len(acceptance.checks.rows)
    print(f"{count - len(failed)} of {count} passed in {sum(acceptance.seconds.values()):.0f} s")
    print(*(f"FAILED: {check}" for check in failed), sep="\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
