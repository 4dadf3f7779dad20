"""
The rates that our documentation names, on real weights and on the small models of the other benchmarks.

    make bench-real                                             # or, with the packages of the bench-real extra there:
    python benchmarks/real_weights.py --tasks minilm minilm_lora
    python benchmarks/real_weights.py --accept-gemma-terms      # with Gemma 3 270M too
    python benchmarks/real_weights.py --tables                  # trains nothing: the tables of what was trained

Every optimizer gets at least four learning rates, a factor of about 3 apart, on seed 0, and more while the best stands
at an edge; the best and the one that is documented run on seeds 1 and 2. Accuracy is of 800 held-out reviews or of 360
held-out digits; loss is held-out, in nats per byte or token. Seconds are the processor's, for training alone.

An interrupted benchmark goes on where it was. Writes `benchmarks/results/real_weights.json` and `.md`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import multiprocessing
import resource
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import real_tasks
import torch
from common import command, finished, kept, machine, markdown_table, write_results
from real_tasks import METHODS, Method


NAME = "real_weights"
STEP = 10**0.5
MOST_RATES = 7
BYTES = 250_000
CLOSE = {"accuracy": 0.02, "loss": 0.05}
# In the order in which they run: an interrupted benchmark has those that matter.
LOW, LOW_MIDDLE, MIDDLE = (1e-4, 3e-4, 3e-5, 1e-3), (3e-4, 1e-3, 1e-4, 3e-3), (1e-3, 3e-3, 3e-4, 1e-2)
MIDDLE_HIGH, HIGH = (3e-3, 1e-2, 1e-3, 3e-2), (1e-2, 3e-2, 3e-3, 1e-1)


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained, with the rates of each method and the ones that our documentation names."""

    title: str
    unit: str  # "accuracy" or "loss"
    run: Callable[[Method, float, int], dict[str, Any]]
    rates: dict[str, tuple[float, ...]]
    documented: dict[str, float]
    seeds: int = 3
    borrow: Callable[[], real_tasks.Runs] | None = None  # runs of another benchmark's result file

    def best(self, scores: dict[float, float]) -> float:
        """The rate with the best score."""
        sign = 1 if self.unit == "accuracy" else -1
        return max(scores, key=lambda lr: sign * scores[lr])


_FULL = {"adamw": LOW, "adafactor": LOW, "sgd_sai": MIDDLE, "rms": LOW, "swan": LOW_MIDDLE, "muon": LOW}
_FULL |= {"rms_later": LOW, "rms_whole": (1e-4, 3e-4)}
_LORA = {
    **dict.fromkeys(("adamw", "adafactor", "muon", "rms"), LOW_MIDDLE),
    **dict.fromkeys(("rms_first", "rms_later", "rms_both", "rms_whole"), (1e-3,)),  # AdamW's best
    **dict.fromkeys(("sgd_sai", "paired", "paired_rms", "swan", "swan_both"), MIDDLE),
}
TASKS = {
    "minilm": Task(
        "MiniLM, 22.7 M, full",
        "accuracy",
        real_tasks.minilm,
        _FULL,
        {"sgd_sai": 1e-3, "rms": 1e-4, "swan": 3e-4},
    ),
    "minilm_lora": Task(
        "MiniLM, LoRA",
        "accuracy",
        functools.partial(real_tasks.minilm, lora=True),
        _LORA,
        {"paired": 1e-3, "paired_rms": 1e-3, "swan": 3e-4},
    ),
    "efficientnet": Task(
        "EfficientNet-Lite0, 3.4 M, full",
        "accuracy",
        real_tasks.efficientnet,
        {"adamw": LOW_MIDDLE, "sgd_sai": MIDDLE, "rms": LOW_MIDDLE, "swan": LOW_MIDDLE},
        {"sgd_sai": 1e-3, "rms": 1e-4, "swan": 3e-4},
    ),
    "gemma_lora": Task(
        "Gemma 3 270M, LoRA",
        "loss",
        real_tasks.gemma,
        {"adamw": (1e-3, 3e-4, 3e-3), "paired": (3e-3, 1e-3, 1e-2), "swan": (1e-3, 3e-4, 3e-3), "paired_rms": (1e-3,)},
        {"paired": 1e-3, "paired_rms": 1e-3, "swan": 3e-4},
        seeds=1,
    ),
    "byte_llama": Task(
        "byte LLaMA from scratch",
        "loss",
        real_tasks.byte_llama,
        {"adamw": (), "sgd_sai": (), "rms": MIDDLE, "swan": ()},
        {"sgd_sai": 1e-2, "rms": 3e-3, "swan": 3e-3},
        borrow=real_tasks.byte_llama_runs,
    ),
    "digits": Task(
        "digits ViT from scratch",
        "accuracy",
        real_tasks.digits,
        {"adamw": (), "sgd_sai": (), "rms": MIDDLE, "swan": ()},
        {"sgd_sai": 1e-2, "rms": 1e-2, "swan": 1e-3},
        borrow=real_tasks.digits_runs,
    ),
    **{
        f"small_lora_{rank}": Task(
            f"LoRA of the demo, r = {rank}",
            "loss",
            functools.partial(real_tasks.small_lora, rank=rank),
            {"adamw": (), "sgd_sai": (), "rms": MIDDLE, "paired": (), "paired_rms": MIDDLE_HIGH, "swan": ()},
            {"paired": 3e-3, "paired_rms": 3e-3, "swan": 1e-3},
            borrow=functools.partial(real_tasks.small_lora_runs, rank),
        )
        for rank in (4, 16)
    },
    **{
        f"batch_{size}": Task(
            f"byte LLaMA from scratch, batch {size}",
            "loss",
            functools.partial(real_tasks.byte_llama, batch_size=size, steps=BYTES // (128 * size)),
            {"adamw": MIDDLE, "sgd_sai": MIDDLE, "swan": MIDDLE},
            {},
            seeds=1,
        )
        for size in (16, 4, 1)
    },
}


def setting_of(task: str, method: str, lr: float, seed: int) -> dict[str, Any]:
    """By which a run is kept."""
    return {"task": task, "method": method, "lr": lr, "seed": seed}


@functools.cache
def borrowed(task: str) -> real_tasks.Runs:
    """Runs of another benchmark's result file."""
    borrow = TASKS[task].borrow
    return borrow() if borrow else {}


def known(task: str, method: str, lr: float, seed: int) -> dict[str, Any] | None:
    """A run that was made, here or in another benchmark."""
    there = borrowed(task).get(method, {}).get((lr, seed))
    found: dict[str, Any] | None = there or kept(NAME, setting_of(task, method, lr, seed))
    return found


def one_run(task: str, method: str, lr: float, seed: int) -> dict[str, Any]:
    """One training, or what it gave before; Gemma's in a process of its own, whose peak memory is noted."""

    def run() -> dict[str, Any]:
        if not task.startswith("gemma"):
            return TASKS[task].run(METHODS[method], lr, seed)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(measured, (task, method, lr, seed))

    there = known(task, method, lr, seed)
    if there is not None:
        return there
    found: dict[str, Any] = finished(NAME, setting_of(task, method, lr, seed), run)
    place = f"{task:<12} {method:<11} lr {lr:<8.2g} seed {seed}"
    print(f"  {place}: {found['score']:.4f} ({found['seconds']:.0f} s)", flush=True)
    return found


def measured(task: str, method: str, lr: float, seed: int) -> dict[str, Any]:
    """A training with the most memory that its process had."""
    torch.set_num_threads(1)
    found = TASKS[task].run(METHODS[method], lr, seed)
    return {**found, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def next_rate(rates: Sequence[float], best: float) -> float | None:
    """One more, where the best of them stands at an edge; rounded as the others are."""
    if len(rates) in (1, MOST_RATES) or best not in (min(rates), max(rates)):
        return None
    return float(f"{best * STEP if best == max(rates) else best / STEP:.0e}")


def rates_of(task: str, method: str) -> list[float]:
    """Those that are named, and the documented one."""
    documented = TASKS[task].documented.get(method)
    elsewhere = [lr for lr, seed in borrowed(task).get(method, {}) if seed == 0]
    return list(dict.fromkeys([*TASKS[task].rates[method], *([documented] if documented else []), *elsewhere]))


def tune(task: str, method: str) -> None:
    """Every rate on seed 0, and more while the best stands at an edge."""
    scores = {lr: one_run(task, method, lr, 0)["score"] for lr in rates_of(task, method)}
    while (lr := next_rate(list(scores), TASKS[task].best(scores))) is not None:
        scores[lr] = one_run(task, method, lr, 0)["score"]


def collected(task: str, method: str) -> dict[str, Any] | None:
    """What was trained of a method: trials by rate, and the runs of the best rate and of the documented one."""

    look = functools.partial(known, task, method)
    about, rates = TASKS[task], rates_of(task, method)
    scores = {lr: run["score"] for lr in rates if (run := look(lr, 0))}
    while scores and (lr := next_rate(list(scores), about.best(scores))) is not None and (run := look(lr, 0)):
        scores[lr] = run["score"]
    if not scores:
        return None
    best, documented = about.best(scores), about.documented.get(method)
    chosen = [lr for lr in dict.fromkeys((best, documented)) if lr in scores]
    return {
        "lr": best,
        "documented": documented,
        "trials": {f"{lr:g}": scores[lr] for lr in sorted(scores)},
        "runs": {
            f"{lr:g}": [without_curve(run) for seed in range(about.seeds) if (run := look(lr, seed))] for lr in chosen
        },
    }


def without_curve(run: dict[str, Any]) -> dict[str, Any]:
    """What a result file holds of a run."""
    return {key: value for key, value in run.items() if key != "losses"}


def mean(runs: Sequence[dict[str, Any]]) -> float:
    """Of the scores."""
    return statistics.mean(run["score"] for run in runs)


def spread(runs: Sequence[dict[str, Any]]) -> str:
    """From the lowest to the highest score."""
    scores = [run["score"] for run in runs]
    return f"{min(scores):.3f} to {max(scores):.3f}"


def best_runs(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of the best rate."""
    found: list[dict[str, Any]] = result["runs"][f"{result['lr']:g}"]
    return found


def written_rate(lr: float) -> str:
    """As the documentation writes it, such as 3e-4."""
    return f"{lr:.0e}".replace("e-0", "e-")


def task_table(task: str, results: dict[str, Any]) -> str:
    """Best first."""
    unit = TASKS[task].unit
    sign = -1 if unit == "accuracy" else 1
    timed = all("seconds" in run for result in results.values() for run in best_runs(result))
    rows = []
    for method, result in sorted(results.items(), key=lambda item: sign * mean(best_runs(item[1]))):
        runs = best_runs(result)
        state, peak = runs[0].get("state_bytes"), runs[0].get("peak_bytes")
        rows.append(
            [
                METHODS[method].label,
                written_rate(result["lr"]),
                f"{mean(runs):.3f}",
                spread(runs),
                *([f"{state / 1e6:.2f} MB"] if state is not None else []),
                *([f"{peak / 1e9:.2f} GB"] if peak is not None else []),
                *([f"{statistics.mean(run['seconds'] for run in runs):.0f}"] if timed else []),
                ", ".join(f"{written_rate(float(lr))}: {score:.3f}" for lr, score in result["trials"].items()),
            ]
        )
    example = best_runs(next(iter(results.values())))[0]
    header = ["optimizer", "best rate", unit, "over the seeds"]
    header += ["state"] * ("state_bytes" in example) + ["peak of the process"] * ("peak_bytes" in example)
    header += ["seconds"] * timed
    return markdown_table([*header, f"rate: {unit} on seed 0"], rows)


def verdict(unit: str, at: float, best: float) -> str:
    """Whether a documented rate is as good as the optimizer's best."""
    behind = best - at if unit == "accuracy" else at - best
    return "yes" if behind <= CLOSE[unit] else f"no, {behind:.3f} behind"


def acceptance(results: dict[str, dict[str, Any]]) -> str:
    """AdamW's best rate beside the documented rate of each of ours, by task."""
    rows = []
    for task, by_method in results.items():
        adamw = by_method.get("adamw")
        theirs = f"{mean(best_runs(adamw)):.3f} ({written_rate(adamw['lr'])})" if adamw else "not trained"
        for method, documented in TASKS[task].documented.items():
            result = by_method.get(method)
            if result is None or f"{documented:g}" not in result["runs"]:
                continue
            at, best = mean(result["runs"][f"{documented:g}"]), mean(best_runs(result))
            rows.append(
                [
                    TASKS[task].title,
                    theirs,
                    METHODS[method].label,
                    written_rate(documented),
                    f"{at:.3f}",
                    f"{best:.3f} ({written_rate(result['lr'])})",
                    verdict(TASKS[task].unit, at, best),
                ]
            )
    header = ["task", "AdamW at its best rate", "optimizer", "documented rate", "there", "at its best rate"]
    return markdown_table([*header, "within 0.02 accuracy, 0.05 nats"], rows)


def batches(results: dict[str, dict[str, Any]]) -> str:
    """Of the same bytes in batches of different sizes: each optimizer at its best rate."""
    tasks = [task for task in results if task.startswith("batch_")]
    methods = dict.fromkeys(method for task in tasks for method in results[task])
    rows = []
    for method in methods:
        found = [results[task].get(method) for task in tasks]
        cells = [f"{mean(best_runs(each)):.3f} ({written_rate(each['lr'])})" if each else "" for each in found]
        rows.append([METHODS[method].label, *cells])
    header = ["optimizer", *(f"batch {task.removeprefix('batch_')}, {step_count(task)} steps" for task in tasks)]
    return markdown_table(header, rows)


def step_count(task: str) -> int:
    """Of a task with batches of its own."""
    return BYTES // (128 * int(task.removeprefix("batch_")))


def text_of(results: dict[str, dict[str, Any]]) -> str:
    """Both kinds of tables."""
    parts = [
        "AdamW at the best of at least four rates, and ours at the rate that the documentation names; mean of the "
        f"seeds (three; one for Gemma).\n\n{acceptance(results)}"
    ]
    if any(task.startswith("batch_") for task in results):
        parts.append(
            f"The byte LLaMA from scratch on {BYTES:,} bytes, held-out loss on seed 0 at the best rate, by batch:\n\n"
            f"{batches(results)}"
        )
    parts += [f"{TASKS[task].title}:\n\n{task_table(task, found)}" for task, found in results.items()]
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is missing, prints, writes the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--accept-gemma-terms", action="store_true", help="they are shown, and Gemma is trained")
    parser.add_argument("--tables", action="store_true", help="train nothing, write what is there")
    parser.add_argument("--no-results", action="store_true", help="train only")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    tasks = [task for task in args.tasks if not task.startswith("gemma")]
    if len(tasks) < len(args.tasks):
        if args.accept_gemma_terms:
            print(real_tasks.gemma_terms())
            tasks = list(args.tasks)
        else:
            print("Gemma is left out: it has terms of its own, which --accept-gemma-terms shows and accepts.")
    cells = [(task, method) for task in tasks for method in TASKS[task].rates if method in args.methods]
    if not args.tables:
        for task, method in cells:
            tune(task, method)
        for task, method in cells:
            for lr in collected(task, method)["runs"]:  # type: ignore[index]
                for seed in range(1, TASKS[task].seeds):
                    one_run(task, method, float(lr), seed)
    if args.no_results:
        return
    results: dict[str, dict[str, Any]] = {}
    for task, method in cells:
        found = collected(task, method)
        if found is not None:
            results.setdefault(task, {})[method] = found
    text = text_of(results)
    print(f"\n{text}")
    about = {"machine": machine("transformers", "peft"), "command": command(__file__, argv)}
    write_results(NAME, {**about, "tasks": results}, text)


if __name__ == "__main__":
    main()
