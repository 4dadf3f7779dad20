"""Writes `hf_sai/optimizers.json` from the records: what the command line needs to know without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_sai.optim.registry import list_records


PACKAGE = Path(__file__).parent.parent / "hf_sai"


def optimizer_rows() -> list[dict[str, Any]]:
    """As JSON holds them."""
    return [
        {
            "name": record.name,
            "description": record.description,
            "options": [
                {
                    "name": option.name,
                    "kind": option.kind,
                    "help": option.help,
                    "default": str(record.default(option.name)),
                }
                for option in record.options
            ],
        }
        for record in list_records()
    ]


def optimizer_text() -> str:
    """The file."""
    return json.dumps(optimizer_rows(), indent=1) + "\n"


if __name__ == "__main__":
    (PACKAGE / "optimizers.json").write_text(optimizer_text(), encoding="utf-8")
