"""Reports of pushed runs, through the real Hub client against a loopback Hub."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hub_server import connected, loopback_hub, online

from hf_sai import GSNRReport, SGDSaI


@pytest.fixture
def report():
    model = torch.nn.Linear(4, 3)
    optimizer = SGDSaI(model.named_parameters())
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    return GSNRReport.from_optimizer(optimizer)


def run(code, hub, home):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=online(hub, home), check=False
    )


def test_scales_of_a_pushed_run_train_another_one(report, tmp_path):
    code = """
import torch, hf_sai
from hf_sai import GSNRReport
report = GSNRReport.from_pretrained("user/run", revision="v1", token="hf_given")
optimizer = hf_sai.create_optimizer("sgd_sai", torch.nn.Linear(4, 3).named_parameters(), gsnr="user/run")
print([row.gsnr for row in report.tensors] == [row.gsnr for row in optimizer.gsnr_statistics()])
print({row.status for row in optimizer.gsnr_statistics()})
"""
    with loopback_hub() as hub:
        for branch in ("main", "v1"):
            hub.add("user/run", {"gsnr_report.json": report.to_json().encode()}, branch=branch)
        done = run(code, hub, tmp_path)
    assert done.stdout.split("\n")[:2] == ["True", "{'given'}"], done.stderr[-2000:]
    asked = [(path.split("/resolve/")[1], headers) for _, path, headers, _ in hub.requests if "/resolve/" in path]
    by_revision = {path.split("/")[0]: headers.get("authorization") for path, headers in asked}
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
    with loopback_hub() as hub:
        done = run(code, hub, tmp_path)
    assert done.stdout.startswith(
        "a g-SNR report must be a file, a folder or a Hub repository with gsnr_report.json, but user/other gave "
    ), done.stderr[-2000:]
    assert done.stdout.count("\n") == 1


def test_the_command_line_reads_a_repository(report, tmp_path):
    code = "import sys; from hf_sai.cli import app; sys.exit(app(['report', 'user/run', '--revision', 'v1']))"
    with loopback_hub() as hub:
        hub.add("user/run", {"gsnr_report.json": report.to_json().encode()}, branch="v1")
        done = run(code, hub, tmp_path)
    assert done.stdout.strip() == report.to_text()
    assert done.returncode == 0


def test_a_report_pushed_by_itself_comes_back_equal(report, monkeypatch):
    with loopback_hub() as hub, connected(hub, monkeypatch):
        commit = report.push_to_hub("run", private=True, token="hf_x", commit_message="measured")
        repo = hub.repos["user/run"]
        assert GSNRReport.from_pretrained("user/run", token="hf_x") == report
    assert commit.oid == repo.head("main")
    assert repo.messages[commit.oid] == "measured"
    assert repo.private
    assert sorted(repo.tree()) == [".gitattributes", "gsnr_report.json", "gsnr_report.png"]
    assert repo.tree()["gsnr_report.json"] == report.to_json().encode()
