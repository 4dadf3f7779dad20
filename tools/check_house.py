"""Fails where a file of the shipped packages has over 450 lines or a function over 60; `make quality` runs it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path


MAX_FILE, MAX_FUNCTION = 450, 60
PACKAGES = ("hf_sai", "trainer_patches", "model_cards")


def too_long(path: Path) -> Iterator[str]:
    """One sentence for each thing in a file that is too long; decorators and docstring count."""
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    if lines > MAX_FILE:
        yield f"{path}: a file has at most {MAX_FILE} lines, but this one has {lines}; split it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min(each.lineno for each in (node, *node.decorator_list))
            length = (node.end_lineno or first) - first + 1
            if length > MAX_FUNCTION:
                yield (
                    f"{path}:{first}: a function has at most {MAX_FUNCTION} lines, but {node.name} has {length}; "
                    "split it"
                )


def main(root: Path) -> int:
    """Prints what is too long under a folder; 1 where there is something."""
    found = [
        fault for package in PACKAGES for path in sorted((root / package).rglob("*.py")) for fault in too_long(path)
    ]
    print("\n".join(found) or "no file and no function is too long")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent.parent))
