"""Bytes of a weight that is stored quantised, by method: only linear layers are, and only frozen ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


NF4_BLOCK, NESTED_BLOCK, SCALED_BLOCK = 64, 256, 128
Packing = Callable[[int, int], int]


def _four_bits(double: bool) -> Packing:
    """
    bitsandbytes: half a byte, and a maximum per block of 64 in float32; with double quantisation in a byte, those
    again in blocks of 256 with a float32 maximum, an offset and a table of 256. And a table of 16 per weight.
    """

    def count(rows: int, columns: int) -> int:
        numel = rows * columns
        blocks = -(-numel // NF4_BLOCK)
        scales = blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 + 4 * 256 if double else 4 * blocks
        return -(-numel // 2) + scales + 4 * 16

    return count


def _int8(rows: int, columns: int) -> int:
    """bitsandbytes: a byte, and a float32 scale per row."""
    return rows * columns + 4 * rows


def _grouped(bits: int, group: int, with_order: bool) -> Packing:
    """GPTQ and AWQ: packed weights, and per group of inputs a float16 scale and a packed zero; GPTQ's order too."""

    def count(rows: int, columns: int) -> int:
        groups = 1 if group < 1 else -(-columns // group)
        packed = rows * columns * bits // 8 + groups * rows * bits // 8
        return packed + 2 * groups * rows + 4 * columns * with_order

    return count


def _scaled(rows: int, columns: int) -> int:
    """fp8: a byte, and a float32 scale per square block of 128."""
    return rows * columns + 4 * -(-rows // SCALED_BLOCK) * -(-columns // SCALED_BLOCK)


QUANTIZATIONS: dict[str, Packing | None] = {
    "none": None,
    "nf4": _four_bits(False),
    "nf4-double": _four_bits(True),
    "int8": _int8,
}


def quantization_of(config: dict[str, Any] | None, asked: str | None) -> tuple[Packing | None, set[str] | None]:
    """
    Bytes of a linear weight of so many rows (outputs) and columns (inputs), `None` where nothing is quantised; and the
    modules that stay whole, `None` for the method's usual ones. From `quantization_config` of a `config.json`, or in
    its place from the one of [`QUANTIZATIONS`] that is asked for. A method that is not counted here is a `ValueError`.
    """
    if asked is not None:
        return QUANTIZATIONS[asked], None
    if not config:
        return None, None
    method = config.get("quant_method") or ("bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & set(config) else "")
    skipped = config.get("llm_int8_skip_modules") or config.get("modules_to_not_convert")
    names = None if skipped is None else set(skipped)
    bits, group = config.get("bits", config.get("w_bit", 4)), config.get("group_size", config.get("q_group_size", 128))
    if method == "bitsandbytes":
        four = bool(config.get("load_in_4bit"))
        return (_four_bits(bool(config.get("bnb_4bit_use_double_quant"))) if four else _int8), names
    if method in ("gptq", "awq"):
        return _grouped(int(bits), int(group), with_order=method == "gptq"), names
    if method == "fp8":
        return _scaled, names
    raise ValueError(
        f"quant_method must be bitsandbytes, gptq, awq or fp8 to be counted but is {method!r}; add --quantization "
        f"({', '.join(QUANTIZATIONS)}) to count another in its place"
    )
