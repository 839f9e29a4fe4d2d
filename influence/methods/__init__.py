"""The methods that score candidates, by the name that `method` has in a config.

Each is a module here of the same name with a `METHOD`; see docs/methods.md. They are imported when
first asked for: checks of a config ask for a method's traits, and methods are made of what is
checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module

from influence.methods.kind import Method

__all__ = ["METHODS", "NAMES", "Method", "those_that"]

NAMES: tuple[str, ...] = (
    "influence_distillation",
    "in2core",
    "less",
    "exact",
    "rds",
    "perplexity",
    "semantic",
    "length",
    "random",
)


class _Registry(Mapping[str, Method]):
    """The modules of NAMES."""

    def __getitem__(self, name: str) -> Method:
        if name not in NAMES:
            raise KeyError(name)
        return import_module(f"{__name__}.{name}").METHOD

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)


METHODS: Mapping[str, Method] = _Registry()


def those_that(trait: str) -> tuple[str, ...]:
    """Names of the methods of which a trait (an attribute of `Method`) is true; for messages."""
    return tuple(name for name in METHODS if getattr(METHODS[name], trait))
