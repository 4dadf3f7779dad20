"""The report of a run: what was measured or routed, as data (`gsnr_report.json`), text, picture and page."""

from .compare import DiffRow
from .facts import format_bytes
from .report import HISTORY_PNG, REPORT_JSON, REPORT_PNG, GSNRReport, ReportDiff
from .rows import RouteRow, TensorRow
from .schema import ReportError, thinned


__all__ = [
    "HISTORY_PNG",
    "REPORT_JSON",
    "REPORT_PNG",
    "DiffRow",
    "GSNRReport",
    "ReportDiff",
    "ReportError",
    "RouteRow",
    "TensorRow",
    "format_bytes",
    "thinned",
]
