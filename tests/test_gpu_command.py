"""The acceptance command of benchmarks/gpu.py, every section on the CPU at its smallest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.timeout(600)
def test_every_section_runs_and_passes_on_the_cpu(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import common
    import gpu

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--device", "cpu", "--tiny"])
    written = json.loads((tmp_path / "gpu_cpu_tiny.json").read_text())
    assert [row for row in written["checks"] if not row["ok"]] == []
    assert ended.value.code == 0
    assert list(written["seconds"]) == list(gpu.SECTIONS)
    table = (tmp_path / "gpu_cpu_tiny.md").read_text()
    assert all(f"### {title}" in table for title in written["speed"])
    assert all("sgd_sai" in rows and "swan" in rows for rows in written["speed"].values())


def test_what_fails_is_said_and_is_the_exit_status(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import common
    import gpu

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu.Acceptance, "_replicas", lambda self: (False, {}))
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--device", "cpu", "--tiny", "--only", "rounding"])
    assert ended.value.code == 1
    assert "FAILED: rounding: replicas are equal" in capsys.readouterr().out
    with pytest.raises(SystemExit) as late:
        gpu.main(["--device", "cpu", "--tiny", "--only", "parity", "--budget", "-1"])
    assert late.value.code == 1
    assert "FAILED: section parity" in capsys.readouterr().out
