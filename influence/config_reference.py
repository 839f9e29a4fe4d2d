"""docs/config.md: every key of a config, out of the classes that check it.

python -m influence.config_reference > docs/config.md
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as limits
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from influence.config import Config
from influence.config_loading import BUILT
from influence.config_section import Section
from influence.methods import NAMES

_HEAD = """\
# Configuration reference

Written by `python -m influence.config_reference` out of the classes that check a config; a test
holds the two together. [guide.md](guide.md) says what to use when.

A key of a section is written with a dot, as `--set` and errors write it:
`--set selection.budget=10%`. Only the keys whose default is "required" have none. An unknown key,
a wrong type or a value out of range is an error that names the key, what was expected, and the
nearest valid name. NAME stands for a name of your own.
"""
#: Values that stand in a registry, or whose code is not all there; the types do not tell.
_VALUES: dict[str, Sequence[object]] = {"method": NAMES, **BUILT}
_PLAIN = {str: "text", int: "integer", float: "number", bool: "true or false", Any: "anything"}


@dataclass(frozen=True)
class Row:
    """One key: `allowed` is its type as it is shown, with what it may be."""

    key: str
    allowed: str
    default: str
    description: str


def reference() -> str:
    """The page, as Markdown."""
    blocks = [_HEAD]
    paths = {section: path for path, section in sections()}
    for path, section in sections():
        blocks.append(f"## {path or 'Top level'}\n\n{_prose(section.__doc__ or '')}\n")
        listed = rows(section, path)
        base = section.__base__
        if base in paths:  # a section with another one's keys: what differs
            blocks[-1] += f"The other keys are those of [{paths[base]}](#{_anchor(paths[base])}).\n"
            listed = [
                row for row in listed if row.key.rsplit(".", 1)[-1] in section.__annotations__
            ]
        if listed:
            blocks.append(_table(listed))
    return "\n".join(blocks)


def sections() -> list[tuple[str, type[Section]]]:
    """(path, class) of every section in the config's order, each class at its shortest path."""
    found = list(_below("", Config))
    shortest: dict[type[Section], str] = {}
    for path, section in sorted(found, key=lambda each: each[0].count(".")):
        shortest.setdefault(section, path)
    return [(path, section) for path, section in found if shortest[section] == path]


def _below(path: str, section: type[Section]) -> Iterator[tuple[str, type[Section]]]:
    yield path, section
    own = section.model_fields if section.__base__ is Section else section.__annotations__
    for name in own:
        for inner, suffix in _inner(section.model_fields[name].annotation):
            yield from _below(_join(path, name) + suffix, inner)


def rows(section: type[Section], path: str) -> list[Row]:
    """A section's keys, in its order."""
    return [_row(_join(path, name), field) for name, field in section.model_fields.items()]


def _row(key: str, field: FieldInfo) -> Row:
    description = field.description or _own_section(field)
    built = _VALUES.get(key)
    if built is not None:
        shown = ", ".join(f"`{value}`" for value in built)
    else:
        shown = _type(field.annotation) + _bounds(field.metadata)
    return Row(key, shown, _default(field), description)


def _own_section(field: FieldInfo) -> str:
    """What a section's class says of it, where the field itself says nothing."""
    inner = [section for section, _suffix in _inner(field.annotation)]
    return _prose(inner[0].__doc__ or "").split(".")[0].rstrip(":") if len(inner) == 1 else ""


def _inner(annotation: Any) -> Iterator[tuple[type[Section], str]]:
    """The sections in a type, and what stands between a key and theirs (".NAME", "[]")."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation, ""
        return
    suffix = {dict: ".NAME", list: "[]"}.get(get_origin(annotation), "")  # pyright: ignore
    for part in get_args(annotation):
        for section, rest in _inner(part):
            yield section, suffix + rest


def _type(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    if annotation is type(None):
        return "null"
    if origin is Annotated:
        return _type(parts[0]) + _bounds(parts[1:])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(part) for part in parts)
    if origin is list:
        return f"list of {_type(parts[0])}"
    if origin is dict:
        return "mapping" if parts[1] is Any else f"NAME: {_type(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        (path,) = (path for path, section in sections() if section is annotation)
        return f"[section](#{_anchor(path)})"
    raise TypeError(f"{annotation!r}: no words for this type; add them to {__name__}")


def _bounds(metadata: Sequence[Any]) -> str:
    """Limits in words; a FieldInfo within an Annotated holds its own."""
    found: list[Any] = []
    for each in metadata:
        found += each.metadata if isinstance(each, FieldInfo) else [each]
    words = []
    for each in found:
        for kind, sign in ((limits.Gt, ">"), (limits.Ge, "≥"), (limits.Lt, "<"), (limits.Le, "≤")):
            if isinstance(each, kind):
                words.append(f" {sign} {_limit(getattr(each, kind.__name__.lower()))}")
        if isinstance(each, limits.MinLen):
            words.append(" (not empty)")
        if (pattern := getattr(each, "pattern", None)) is not None:
            words.append(f" like `{pattern}`")
    return ",".join(words)


def _limit(value: Any) -> str:
    power = value.bit_length() - 1 if isinstance(value, int) else 0
    return f"2^{power}" if power > 20 and value == 1 << power else f"{value}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Section):
        return "see there"
    if value is PydanticUndefined:
        return "required"
    return (
        f"`{json.dumps(value, ensure_ascii=False)}`" if not isinstance(value, str) else f"`{value}`"
    )


def _table(listed: Sequence[Row]) -> str:
    lines = ["| key | value | default | |", "|---|---|---|---|"]
    for row in listed:
        cells = (f"`{row.key}`", row.allowed, row.default, row.description)
        lines.append("| " + " | ".join(_prose(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _prose(text: str) -> str:
    return " ".join(text.split())


def _anchor(path: str) -> str:
    """The heading's anchor as Markdown's renderers make it."""
    return "".join(c for c in path.lower() if c.isalnum() or c in "-_")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


if __name__ == "__main__":
    print(reference(), end="")
