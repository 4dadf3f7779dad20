"""
What is known of the optimizers without torch: the names of [`hf_sai.optim.registry`] with their options and rows, and
the constants that a report's words name.

`hf_sai/optimizers.json` has the facts of our own records; `tools/write_tables.py` writes it, and a test holds the two
together.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any


ADAM = "adam"  # the route of what goes to Adam
# What torch's wrappers put into names; none is a name that a model gives.
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
# A's learning rate as a multiple of B's, in LoRA's pairs (`hf_sai.optim.lora_pairs`). 0.1, 0.3 and 1 were tried on
# seed 0 at r = 4; docs/lora.md has 0.3 beside 1.
A_RATE = 0.3


def optimizer_table() -> list[dict[str, Any]]:
    """
    Facts of every optimizer, in the order of the names: name, description, rows, options (name, kind, help, default).

    They come from the records where these are loaded, for a program may have added one; else from the file.
    """
    registry = sys.modules.get("hf_sai.optim.registry")
    return _written() if registry is None else [record.facts for record in registry.list_records()]


def facts_of(name: str) -> dict[str, Any] | None:
    """One row of [`optimizer_table`]; `None` where no optimizer has that name."""
    return next((row for row in optimizer_table() if row["name"] == name), None)


def defaults_of(name: str) -> dict[str, Any]:
    """Default by option, as JSON holds it; empty where no optimizer has that name."""
    found = facts_of(name)
    return {} if found is None else {option["name"]: option["default"] for option in found["options"]}


@functools.cache
def _written() -> list[dict[str, Any]]:
    path = Path(__file__).parent / "optimizers.json"
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found
