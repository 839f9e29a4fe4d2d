"""How much memory the gradients of a pool may take: a share, or bytes."""

from __future__ import annotations

import re

from influence.errors import InputError

_MEMORY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(%|[kMGT]?B)\s*")
_BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_memory(text: str | int) -> tuple[float | None, float | None]:
    """(share of what all layers take, bytes), of which one is None: `10%`, `20GB`, `5000000`.

    Raises:
        InputError: anything else; names layer_economy.memory.
    """
    match = None if isinstance(text, int) else _MEMORY.fullmatch(text)
    if isinstance(text, int) and text > 0:
        return None, float(text)
    if match is None or not float(match[1]) or (match[2] == "%" and float(match[1]) > 100):
        raise InputError(
            f"layer_economy.memory: {text!r}; expected a share of what the gradients of all layers "
            "take (10%), or bytes for those of the whole pool (20GB)"
        )
    if match[2] == "%":
        return float(match[1]) / 100, None
    return None, float(match[1]) * _BYTES[match[2]]
