"""The g-SNR report: what was measured, as data (`gsnr_report.json`) and as a picture (`gsnr_report.png`)."""

from .report import REPORT_JSON, REPORT_PNG, GSNRReport, ReportError, TensorRow, optimizer_state_bytes


__all__ = ["REPORT_JSON", "REPORT_PNG", "GSNRReport", "ReportError", "TensorRow", "optimizer_state_bytes"]
