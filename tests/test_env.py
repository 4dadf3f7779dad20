"""`hf-sai env`: versions for a bug report, and nothing that names a machine or a user."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import hf_sai
from hf_sai.cli import app
from hf_sai.cli.env import PACKAGES, environment
from trainer_patches.compat import NEWEST_TRIED


@pytest.fixture
def installed(monkeypatch):
    """The metadata of another machine: versions by package, no other package is there."""
    versions = {
        "hf_sai": hf_sai.__version__,
        "torch": "2.9.1+cu128",
        "transformers": "5.2.0",
        "peft": "0.21.9",
        "diffusers": "0.43.0.dev0",
        "huggingface_hub": "1.3.0",
    }

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return versions


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """NVIDIA's command of a machine with two GPUs, beside which there is no other."""
    command = tmp_path / "nvidia-smi"
    command.write_text("""#!/bin/sh
[ "$1" = -L ] || exit 1
echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'
echo 'GPU 1: NVIDIA H100 (UUID: GPU-2)'
echo '  MIG 1g.10gb Device 0: (UUID: MIG-1)'
""")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


def test_the_list_by_value(installed, monkeypatch, driver):
    monkeypatch.setattr(platform, "python_version", lambda: "3.12.4")
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    result = CliRunner().invoke(app, ["env"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        f"- hf_sai: {hf_sai.__version__}",
        "- python: 3.12.4",
        "- platform: Linux aarch64",
        "- torch: 2.9.1+cu128",
        "- transformers: 5.2.0",
        "- trl: not installed",
        "- peft: 0.21.9",
        "- accelerate: not installed",
        "- diffusers: 0.43.0.dev0 (newer than 0.42.1, the newest that was tried)",
        "- huggingface_hub: 1.3.0",
        "- deepspeed: not installed",
        "- NVIDIA GPUs: 2",
    ]


def test_a_machine_without_the_driver_has_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment()["NVIDIA GPUs"] == "0"


def test_what_was_tried_is_what_is_pinned():
    pinned = dict(
        line.split(" ")[0].split("==")
        for line in (Path(__file__).parent.parent / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    assert {name: pinned[name] for name in NEWEST_TRIED} == NEWEST_TRIED


def test_versions_are_those_of_the_modules():
    import accelerate
    import huggingface_hub
    import peft
    import transformers

    found = environment()
    for module in (accelerate, huggingface_hub, peft, torch, transformers):
        assert found[module.__name__].split("+")[0] == module.__version__.split("+")[0]


def test_nothing_names_the_machine_or_its_user(tmp_path):
    """In a process whose environment, home and folder are full of what must not be in a bug report."""
    secret = "hf_" + "SecretSecretSecretSecret" + "0123456789"
    folder = tmp_path / "somebody"
    folder.mkdir()
    changed = {"HF_TOKEN": secret, "HOME": str(folder), "USER": "somebody", "HF_HOME": str(folder / "cache")}
    code = "import sys; from hf_sai.cli import app; app(['env'], prog_name='hf-sai')"
    environment = {**os.environ, **changed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    names = [line.split(": ")[0] for line in done.stdout.splitlines()]
    assert names == [f"- {name}" for name in ("hf_sai", "python", "platform", *PACKAGES, "NVIDIA GPUs")]
    for word in (secret, "somebody", os.sep, sys.prefix):
        assert word not in done.stdout
