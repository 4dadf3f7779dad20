"""The command line through its real entry point."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from hf_sai import GSNRReport, SGDSaI
from hf_sai.cli import app


def test_list_names_every_option_with_its_default():
    result = CliRunner().invoke(app, ["list"])
    assert result.exit_code == 0
    assert result.output.startswith("sgd_sai: ")
    assert "  momentum=0.9  (a number)" in result.output
    assert max(len(line) for line in result.output.splitlines()) <= 80


def test_report_prints_the_table(tmp_path):
    param = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = SGDSaI([("layers.0.q.weight", param)])
    param.grad = torch.randn(4, 4)
    optimizer.step()
    GSNRReport.from_optimizer(optimizer).save(tmp_path, picture=False)
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 0
    assert "1 tensors: 1 measured\n" in result.output


def test_report_of_a_damaged_file_is_one_sentence(tmp_path):
    (tmp_path / "gsnr_report.json").write_text("{")
    for path in (tmp_path, tmp_path / "missing"):
        result = CliRunner().invoke(app, ["report", str(path)])
        assert result.exit_code == 1
        assert result.stderr.startswith("hf-sai: ")
        assert result.stderr.count("\n") == 1


@pytest.fixture
def saved(tmp_path):
    """A folder with the report of a run whose parameter has a name that rich would read as markup."""
    param = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = SGDSaI([("layers.0.[bold]q.weight", param)])
    param.grad = torch.randn(4, 4)
    optimizer.step()
    report = GSNRReport.from_optimizer(optimizer)
    report.save(tmp_path, picture=False)
    return tmp_path, report


def test_report_into_a_pipe_has_no_colour_whatever_the_environment_says(saved, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(app, ["report", str(saved[0])])
    assert result.output == f"{saved[1].to_text()}\n"
    assert "\x1b" not in result.output


def test_report_on_a_terminal_has_colours_in_80_columns(saved):
    terminal, other = pty.openpty()
    code = "import sys; from hf_sai.cli import app; app(sys.argv[1:])"
    environment = {**{k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}, "TERM": "xterm"}
    command = [sys.executable, "-c", code, "report", str(saved[0])]
    subprocess.run(command, stdout=other, stderr=subprocess.PIPE, env=environment, check=True, timeout=240)
    os.close(other)
    shown = b""
    with contextlib.suppress(OSError):  # what a terminal says at its end
        while part := os.read(terminal, 4096):
            shown += part
    os.close(terminal)
    text = shown.decode().replace("\r\n", "\n")
    assert "\x1b[32m1 measured\x1b[0m" in text
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert [line.rstrip() for line in plain.splitlines()] == saved[1].to_text().splitlines()


def test_report_writes_page_and_markdown(saved, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.chdir(tmp_path)
    folder, report = str(saved[0]), saved[1]
    result = CliRunner().invoke(app, ["report", folder, "--html"])
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "wrote gsnr_report.html\n")
    assert (tmp_path / "gsnr_report.html").read_text(encoding="utf-8") == report.to_html()
    assert CliRunner().invoke(app, ["report", folder, "--open", "--output", "other.html"]).exit_code == 0
    assert opened == [(tmp_path / "other.html").as_uri()]
    assert (tmp_path / "other.html").read_text(encoding="utf-8") == report.to_html()
    assert CliRunner().invoke(app, ["report", folder, "--markdown"]).stdout == report.to_markdown()
    assert CliRunner().invoke(app, ["report", folder, "--output", "report.txt"]).exit_code == 0
    assert (tmp_path / "report.txt").read_text(encoding="utf-8") == f"{report.to_text()}\n"
    assert CliRunner().invoke(app, ["report", folder, "--html", "--markdown"]).exit_code == 2
    failed = CliRunner().invoke(app, ["report", folder, "--html", "--output", "no/folder.html"])
    assert (failed.exit_code, failed.stderr.count("\n")) == (1, 1)
