"""Reports of pushed runs, through the real Hub client against a loopback Hub."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hub_server import loopback_hub

from hf_sai import GSNRReport, SGDSaI


@pytest.fixture
def report():
    model = torch.nn.Linear(4, 3)
    optimizer = SGDSaI(model.named_parameters())
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    return GSNRReport.from_optimizer(optimizer)


def run(code, endpoint, home):
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
    environment = {k: v for k, v in environment.items() if k not in ("HF_HUB_CACHE", "HF_DATASETS_CACHE")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


def test_scales_of_a_pushed_run_train_another_one(report, tmp_path):
    code = """
import torch, hf_sai
from hf_sai import GSNRReport
report = GSNRReport.from_pretrained("user/run", revision="v1", token="hf_given")
optimizer = hf_sai.create_optimizer("sgd_sai", torch.nn.Linear(4, 3).named_parameters(), gsnr="user/run")
print([row.gsnr for row in report.tensors] == [row.gsnr for row in optimizer.gsnr_statistics()])
print({row.status for row in optimizer.gsnr_statistics()})
"""
    content = report.to_json().encode()
    with loopback_hub({("user/run", r, "gsnr_report.json"): content for r in ("main", "v1")}) as (endpoint, requests):
        done = run(code, endpoint, tmp_path)
    assert done.stdout.split("\n")[:2] == ["True", "{'given'}"], done.stderr[-2000:]
    by_revision = {path.split("/resolve/")[1].split("/")[0]: token for method, path, token in requests}
    assert by_revision["v1"] == "Bearer hf_given"
    assert by_revision["main"] is None


def test_a_repository_without_a_report_is_one_sentence(tmp_path):
    code = """
from hf_sai import GSNRReport
try:
    GSNRReport.from_pretrained("user/other")
except ValueError as error:
    print(error)
"""
    with loopback_hub({}) as (endpoint, _):
        done = run(code, endpoint, tmp_path)
    assert done.stdout.startswith(
        "a g-SNR report must be a file, a folder or a Hub repository with gsnr_report.json, but user/other gave "
    ), done.stderr[-2000:]
    assert done.stdout.count("\n") == 1


def test_the_command_line_reads_a_repository(report, tmp_path):
    content = report.to_json().encode()
    code = "import sys; from hf_sai.cli import app; sys.exit(app(['report', 'user/run', '--revision', 'v1']))"
    with loopback_hub({("user/run", "v1", "gsnr_report.json"): content}) as (endpoint, _):
        done = run(code, endpoint, tmp_path)
    assert done.stdout.strip() == report.to_text()
    assert done.returncode == 0
