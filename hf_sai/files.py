"""Files that are whole or not there, work that may fail without ending a training, and what a user switches off."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path


def is_switched_off(variable: str) -> bool:
    """Whether the user has set an environment variable of ours to 0, false, no or off."""
    return os.environ.get(variable, "").lower() in ("0", "false", "no", "off")


def write_whole(path: Path, content: bytes) -> None:
    """A reader (or an upload) sees the old file or the new one, never a part of it."""
    temporary = path.with_name(f"_{path.name}.{os.getpid()}")  # a push leaves out what begins with "_"
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def copy_whole(source: Path, target: Path) -> None:
    """Copies a file that is there and differs, whole or not at all: a checkpoint may be complete already."""
    if source.is_file():
        content = source.read_bytes()
        if not target.is_file() or target.read_bytes() != content:
            write_whole(target, content)


@contextlib.contextmanager
def warning_instead(logger: logging.Logger, text: str) -> Iterator[None]:
    """What goes wrong inside is a warning with this text: whatever it is, it is not worth a training run."""
    try:
        yield
    except Exception:
        logger.warning(text, exc_info=True)
