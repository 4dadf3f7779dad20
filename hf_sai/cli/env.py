"""`hf-sai env`: the versions that a bug report needs."""

from __future__ import annotations

import importlib.metadata
import platform

import typer


PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "diffusers", "huggingface_hub", "deepspeed")


def env() -> None:
    """Versions of this package, of Python and of the hosts, to paste into a bug report."""
    for name, value in environment().items():
        typer.echo(f"- {name}: {value}")


def environment() -> dict[str, str]:
    """
    What a bug report says of a machine: versions and the number of GPUs. It names neither the machine nor its user: no
    path, no environment variable, no token.

    Returns:
        `dict[str, str]`: Value by name, in the order of a report.
    """
    import torch

    return {
        "hf_sai": _version("hf_sai"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **{name: _version(name) for name in PACKAGES},
        "GPUs": str(torch.cuda.device_count()),
    }


def _version(package: str) -> str:
    """From the package's metadata: importing the hosts would take seconds."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
