"""The report of a run: what was measured or routed, as data (`gsnr_report.json`) and as a picture."""

from .report import (
    HISTORY_PNG,
    REPORT_JSON,
    REPORT_PNG,
    GSNRReport,
    ReportError,
    RouteRow,
    TensorRow,
    copy_whole,
    optimizer_state_bytes,
)


__all__ = [
    "HISTORY_PNG",
    "REPORT_JSON",
    "REPORT_PNG",
    "GSNRReport",
    "ReportError",
    "RouteRow",
    "TensorRow",
    "copy_whole",
    "optimizer_state_bytes",
]
