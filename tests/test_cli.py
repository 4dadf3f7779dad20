"""The command line through its real entry point."""

from __future__ import annotations

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
