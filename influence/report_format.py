"""How the report writes numbers: the template's filters."""

from __future__ import annotations

import math
from collections.abc import Callable

from influence.schemas import Interval, Recall, Round

DASH = "–"


def whole(value: float | None) -> str:
    """1234567 -> 1,234,567."""
    return DASH if value is None else f"{value:,.0f}"


def decimal(value: float | None, digits: int = 2) -> str:
    """A correlation or ratio with a true minus sign."""
    if value is None or not math.isfinite(value):
        return DASH
    return _signed(f"{value:,.{digits}f}")


def significant(value: float | None) -> str:
    """A score: three significant digits."""
    if value is None or not math.isfinite(value):
        return DASH
    return _signed(f"{value:#.3g}".rstrip("."))


def _signed(text: str) -> str:
    return text.replace("-", "−") if text.strip("-0.,") else text.replace("-", "")


def percent(value: float | None, digits: int = 1) -> str:
    """0.0512 -> 5.1%."""
    if value is None:
        return DASH
    shown = f"{100 * value:.{digits}f}"
    if value > 0 and not float(shown):
        return f"< {10**-digits:.{digits}f}%"
    return f"{shown}%"


def interval(value: Interval) -> str:
    """0.78 [0.70, 0.84]."""
    return _bracketed(decimal(value.value), decimal(value.low), decimal(value.high))


def recall(value: Recall) -> str:
    """91% [86%, 95%]."""
    low, high = percent(value.low, 0), percent(value.high, 0)
    return _bracketed(percent(value.expected, 0), low, high)


def round_recall(value: Round) -> str:
    """91.2% [86.0%, 95.1%]."""
    shown = (percent(each) for each in (value.expected, value.low, value.high))
    return _bracketed(*shown)


def _bracketed(value: str, low: str, high: str) -> str:
    return value if low == DASH and high == DASH else f"{value} [{low}, {high}]"


def seconds(value: float | None) -> str:
    """Seconds in the unit a person would use: 0.42 s, 12.3 s, 4 min 05 s, 3 h 20 min."""
    if value is None:
        return DASH
    if value < 59.95:
        return f"{value:.2f} s" if value < 1 else f"{value:.1f} s"
    total = round(value)
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"


def size(value: float) -> str:
    """Bytes in the unit a person would use: 512 bytes, 3.4 kB, 12.3 MB, 1.2 TB."""
    if value < 1000:
        return f"{value:.0f} bytes"
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.95 or unit == "TB":
            break
    return f"{value:,.1f} {unit}"


FILTERS: dict[str, Callable[..., str]] = {
    "whole": whole,
    "decimal": decimal,
    "significant": significant,
    "percent": percent,
    "interval": interval,
    "recall": recall,
    "round_recall": round_recall,
    "seconds": seconds,
    "size": size,
}
