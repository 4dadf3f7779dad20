"""The one place that knows where the report's pictures are drawn: drawing one takes as long as a tiny training."""

from __future__ import annotations

import pytest


PICTURE = b"a picture"


def no_pictures(patch=None):
    """Reports are saved with [`PICTURE`] until `patch` is undone; without one for good, in a process of its own."""
    from hf_sai.report import plots

    patch = patch or pytest.MonkeyPatch()
    for name in ("report_png", "history_png"):
        patch.setattr(plots, name, lambda report: PICTURE)


def drawn_reports(patch):
    """A list that gets every report that is drawn from now on."""
    from hf_sai.report import plots

    drawn, original = [], plots.report_png
    patch.setattr(plots, "report_png", lambda report: drawn.append(report) or original(report))
    return drawn
