"""The warning that bf16 parameters would move by less than they resolve."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any


logger = logging.getLogger(__name__)

# A bf16 number has 8 bits of mantissa: a change below half of 2^-8 of it is rounded away.
BF16_RESOLUTION = 2.0**-8


def loses_digits(group: dict[str, Any]) -> bool:
    """Whether what is below the resolution of bf16 parameters is lost."""
    return not (group["stochastic_rounding"] or group["kahan_sum"])


def peak_rate(group: dict[str, Any]) -> float:
    """The learning rate that a schedule starts from, or the present one."""
    return float(group.get("initial_lr", group["lr"]))


def warn_of_stall(moves: Sequence[tuple[str, float, float]]) -> bool:
    """
    Warns of bf16 parameters that move by less than they resolve.

    Args:
        moves (sequence of tuples): Name, norm of a step, norm of the parameter.

    Returns:
        `bool`: Whether there was one.
    """
    stuck = [(move / size, name) for name, move, size in moves if 0.0 < move < BF16_RESOLUTION * size]
    if stuck:
        logger.warning(
            "%d of %d bf16 parameters move by less than 2^-8 of their size in a step (%s: %.1e), so that most of it "
            "is rounded away: set kahan_sum=True or stochastic_rounding=True, keep the parameters in float32, or "
            "raise the learning rate.",
            len(stuck),
            len(moves),
            min(stuck)[1],
            min(stuck)[0],
        )
    return bool(stuck)
