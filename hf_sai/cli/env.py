"""`hf-sai env`: the versions that a bug report needs."""

from __future__ import annotations

import platform
import subprocess

import typer

from trainer_patches.compat import NEWEST_TRIED, is_newer_than_tried, version_of


PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "diffusers", "huggingface_hub", "deepspeed")


def env() -> None:
    """Versions of this package, of Python and of the hosts, to paste into a bug report."""
    for name, value in environment().items():
        typer.echo(f"- {name}: {value}")


def environment() -> dict[str, str]:
    """
    What a bug report says of a machine, in its order: versions and the number of NVIDIA's GPUs. It names neither the
    machine nor its user: no path, no environment variable, no token.
    """
    return {
        "hf_sai": version_of("hf_sai"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **{name: _shown(name, version_of(name)) for name in PACKAGES},
        "NVIDIA GPUs": str(_count_gpus()),
    }


def _shown(package: str, version: str) -> str:
    """A version, with the newest that was tried where it is above that."""
    newer = is_newer_than_tried(package, version)
    return f"{version} (newer than {NEWEST_TRIED[package]}, the newest that was tried)" if newer else version


def _count_gpus() -> int:
    """As NVIDIA's driver lists them: importing torch to ask it would take seconds."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())
