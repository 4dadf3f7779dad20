"""Reports that no run wrote."""

from __future__ import annotations

import math

from hf_sai import GSNRReport
from hf_sai.report import TensorRow


def tensor_row(name, layer, shape, ratio, status="measured", kind=None):
    numel = math.prod(shape)
    gsnr = 0.0 if status == "pending" else ratio * math.sqrt(numel)
    settled = status != "pending"
    return TensorRow(name, kind or name.split(".")[-2], layer, shape, numel, gsnr, ratio * settled, gsnr, 0.1 * gsnr,
                     int(settled), status)  # fmt: skip


def report_of(rows, **changed):
    fields = {"history": [], "schedule": [0.5, 1.0], "versions": {"hf_sai": "0.1.0"}, "run": {"seed": 1}, **changed}
    return GSNRReport("sgd_sai", {"normalize": "none"}, 0.1, 0.0, 1.0, rows, [], 3_000_000, 6_000_000, **fields)
