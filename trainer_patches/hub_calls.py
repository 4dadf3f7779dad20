"""Another way to the Hub for the host's Trainer: what it would create and upload goes through given functions."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from .compat import seam


@contextmanager
def replaced_hub_calls(create_repo: Callable[..., Any], upload_folder: Callable[..., Any]) -> Iterator[None]:
    """
    While it is open, `transformers.Trainer` creates repositories and uploads folders through these functions.

    They get the arguments of `huggingface_hub`'s functions of the same names. Nothing else in the process is changed:
    the names are replaced in the host's module only.

    Args:
        create_repo (callable): Gives an object with a `repo_id`.
        upload_folder (callable): Gives a commit, or a future where `run_as_future` is set.
    """
    module = importlib.import_module("transformers.trainer")
    calls = {"create_repo": create_repo, "upload_folder": upload_folder}
    if hasattr(module, "hf_api"):  # since transformers 5.10.1; before, the functions stand in the module
        api = SimpleNamespace(**calls)
        calls = {"hf_api": lambda: api}
    lost = "pushes are the host's own, which tries nothing again and looks for no token"
    calls = {name: call for name, call in calls.items() if seam(module, name, lost) is not None}
    before = {name: module.__dict__[name] for name in calls}
    module.__dict__.update(calls)
    try:
        yield
    finally:
        module.__dict__.update(before)
