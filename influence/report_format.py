"""How the report writes numbers: the template's filters."""

from __future__ import annotations

import math
from collections.abc import Callable

from influence.records import Interval, Recall, Round

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


def short_seconds(value: float) -> str:
    """Seconds in one figure, for an estimate: 0.4 s, 38 s, 12 min, 3.4 h, 120 h."""
    if value < 90:
        return f"{value:.1f} s" if value < 9.95 else f"{value:.0f} s"
    if value < 5400:
        return f"{value / 60:.0f} min"
    hours = value / 3600
    return f"{hours:.1f} h" if hours < 99.95 else f"{hours:,.0f} h"


def amount(value: float) -> str:
    """A count: exact below 100,000, then three digits: 57,412, 120k, 1.20M, 3.45G, 6.78T, 9.01P."""
    if value < 99_999.5:
        return f"{value:,.0f}"
    for unit in ("k", "M", "G", "T", "P", "E"):
        value /= 1000
        if value < 999.5 or unit == "E":
            break
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:,.{digits}f}{unit}"


def money(value: float | None) -> str:
    """1234.5 -> 1,235; 12.34 -> 12.34; 0.004 -> < 0.01; hours of nodes likewise."""
    if value is None:
        return DASH
    if 0 < value < 0.01:
        return "< 0.01"
    return f"{value:,.2f}" if value < 99.995 else f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes in the unit a person would use: 512 bytes, 3.4 kB, 12.3 MB, 1.2 TB."""
    if value < 1000:
        return f"{value:.0f} bytes"
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.95 or unit == "TB":
            break
    return f"{value:,.1f} {unit}"


def short_size(value: float) -> str:
    """As `size`, for narrow columns: 512 B, 3.4 kB, 123 MB."""
    number, unit = size(value).replace(" bytes", " B").split(" ")
    whole_part, _, decimals = number.partition(".")
    return f"{whole_part if len(whole_part) > 2 or not decimals else number} {unit}"


def step_phrase(kind: str | None, state: str | None) -> str:
    """Whose step the scores are about, in a phrase; nothing for plain gradient descent."""
    if state is None and kind in (None, "sgd"):
        return ""
    name = {"sgd": "SGD", "adamw": "AdamW"}.get(kind or "", kind)
    return f"the next step of {name}, with the state of {state or 'the warm-up'}"


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
    "amount": amount,
}
