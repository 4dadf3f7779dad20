"""What every benchmark here needs: the machine, the versions, and result files as JSON and as a Markdown table."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


RESULTS = Path(__file__).parent / "results"
RUNS = Path(__file__).parent / "runs"  # finished runs of an interrupted benchmark; not in git


def machine(*packages: str) -> dict[str, Any]:
    """What figures were measured on; `packages` besides torch and hf_sai."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions("torch", "hf_sai", *packages),
        "date": datetime.date.today().isoformat(),
    }


def versions(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def finished(benchmark: str, setting: dict[str, Any], run: Callable[[], Any]) -> Any:
    """
    What `run()` gives, or gave before: a long benchmark that was interrupted goes on where it was.

    Kept in `benchmarks/runs/<benchmark>.jsonl`, by the whole setting and the versions; delete the file to run afresh.
    """
    found = kept(benchmark, setting)
    if found is not None:
        return found
    result = run()
    RUNS.mkdir(exist_ok=True)
    with (RUNS / f"{benchmark}.jsonl").open("a") as file:
        file.write(json.dumps({"key": _key(setting), "result": result}) + "\n")
    return result


def kept(benchmark: str, setting: dict[str, Any]) -> Any:
    """What [`finished`] has kept of a run; `None` where it has not run."""
    path, key = RUNS / f"{benchmark}.jsonl", _key(setting)
    lines = map(json.loads, path.read_text().splitlines() if path.is_file() else [])
    return next((line["result"] for line in lines if line["key"] == key), None)


def _key(setting: dict[str, Any]) -> str:
    return json.dumps({**setting, "versions": versions("torch", "hf_sai", "transformers")}, sort_keys=True)


def command(script: str, argv: Sequence[str] | None) -> str:
    """What is typed to get there again; `None` is what was typed."""
    return " ".join(["python", f"benchmarks/{Path(script).name}", *(sys.argv[1:] if argv is None else argv)])


def device_name() -> str:
    """`"cuda"` where there is one, else `"cpu"`: part of a result file's name."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    """Waits for an accelerator."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_extra_bytes(function: Callable[[], Any]) -> int:
    """The most bytes that a function had allocated at a time, beyond what stood before it; torch's own record."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        torch.empty(1)  # so that the record is never empty
        function()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; numbers are right-aligned by the reader's eye, not by spaces."""
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def write_results(name: str, results: dict[str, Any], markdown: str) -> None:
    """`results/<name>.json` and `.md`; the machine is named in both."""
    RESULTS.mkdir(exist_ok=True)
    where = results["machine"]
    known = ", ".join(f"{package} {version}" for package, version in where["versions"].items())
    footer = f"Measured on {where['device']}, {where['threads']} threads, Python {where['python']}, {known}; "
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(f"{markdown.strip()}\n\n{footer}{where['date']}.\n")
    print(f"\nwritten to benchmarks/results/{name}.json and .md")
