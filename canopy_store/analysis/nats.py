"""Nats in words: how many answers an entropy stands for, and what is that per token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_COUNTED = math.log(1e6)  # below a million the number itself is read at a glance
_EXACT = math.log(1e100)  # above, a digit before the power of ten says nothing


def number(nats: float) -> str:
    """exp(nats) to two figures as people write it: '1.4', '4,700', '5 × 10¹⁸', '10²¹⁷'."""
    if nats < _COUNTED:
        count = math.exp(nats)
        return f"{count:.1f}" if count < 9.95 else f"{float(f'{count:.2g}'):,.0f}"
    power = nats / math.log(10)
    if nats >= _EXACT:
        return _ten(round(power))
    digit, whole = round(10 ** (power % 1)), math.floor(power)
    if digit == 10:
        digit, whole = 1, whole + 1
    return _ten(whole) if digit == 1 else f"{digit} × {_ten(whole)}"


def _ten(power: int) -> str:
    return f"10{str(power).translate(_RAISED)}"


def size(ce_star: float, mean_length: float | None) -> str:
    """An entropy as the number of equally likely answers that would be as uncertain, and per token.

    Parameters
    ----------
    ce_star : nats a rollout
    mean_length : tokens a rollout; their ratio is the logarithm of ``gen_ppl``
    """
    text = f"{number(ce_star)} equally likely answers"
    if not mean_length:
        return text
    rate = ce_star / mean_length
    return (
        f"{text}; per token {rate:.2f} nats ({rate / math.log(2):.2f} bits), "
        f"a choice among {number(rate)}"
    )


def ratio(row: Mapping[str, Any]) -> str:
    """Which side of a row of `compare` on ``ce_star`` has how many times as many answers.

    With the interval of the change; '' where the change is not defined.
    """
    if row["delta"] is None:
        return ""
    sides = row["baseline_variant"], row["variant"]
    more, less = sides if row["delta"] < 0 else sides[::-1]
    text = f"{more} has {number(abs(row['delta']))} times as many answers as {less}"
    low, high = row["delta_ci_low"], row["delta_ci_high"]
    if low is None:
        return text
    ends = sorted((-low, -high) if row["delta"] < 0 else (low, high))
    if ends[0] < 0:
        return f"{text} (from {number(-ends[0])} times fewer to {number(ends[1])} times as many)"
    return f"{text} ({number(ends[0])} to {number(ends[1])})"
