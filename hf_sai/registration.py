"""
Our names among the host's choices, without importing what they stand for: an `import hf_sai` costs no torch.

The names and their options are in `optimizers.json`, which `tools/write_tables.py` writes from the records; a test
holds the two together.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import trainer_patches


def optimizer_table() -> list[dict[str, Any]]:
    """Name, description and options (name, kind, help, default) of every optimizer, in the order of the names."""
    table: list[dict[str, Any]] = json.loads((Path(__file__).parent / "optimizers.json").read_text(encoding="utf-8"))
    return table


def register() -> None:
    """
    Makes the names of [`list_records`] valid for `TrainingArguments(optim=...)`; done by `import hf_sai`.

    Idempotent. Neither transformers nor torch is imported by it; the names appear when transformers is.

    Raises:
        `trainer_patches.UnsupportedHostError`: The installed transformers is not one that this works with.
    """
    for name in _names():
        trainer_patches.add_optimizer(name, functools.partial(_handle, name))


def unregister() -> None:
    """Undoes [`register`]: the host's enum, table and parser are as they were."""
    for name in _names():
        trainer_patches.remove_optimizer(name)


def _names() -> list[str]:
    """Of the records where they are loaded (a program may have added one), else of the table."""
    registry = sys.modules.get("hf_sai.optim.registry")
    return (
        [row["name"] for row in optimizer_table()] if registry is None else [r.name for r in registry.list_records()]
    )


def _handle(name: str, context: Any) -> tuple[Any, dict[str, Any]]:
    """Handler for the host's table: `OptimizerContext` in, class and keyword arguments out."""
    from .integration import handle

    return handle(name, context)
