"""YAML and `--set` values -> `Config`, with errors that name the key, what was expected, and why.

Also here: values whose code comes later are refused by name, and credentials anywhere in a config
are refused without being echoed.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from influence.config import Config
from influence.config_checks import check_together
from influence.credentials import refuse_credentials, refuse_in_override
from influence.errors import InputError

# Key -> the values whose code is part of this version.
BUILT: dict[str, tuple[object, ...]] = {
    "landmarks.choose": ("certified", "uniform", "stratified"),
}


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config, apply `a.b=value` overrides, validate, refuse what is not built.

    Raises:
        InputError: missing file, bad YAML, unknown key, wrong type, credential, unbuilt value.
    """
    return parse_config(read_yaml(path), overrides, name=path)


def parse_config(data: object, overrides: Sequence[str] = (), name: str = "config") -> Config:
    """Validate a mapping as a `Config`; `name` is what errors call the file."""
    if not isinstance(data, dict):
        raise InputError(
            f"{name}: expected a mapping of keys to values, found {type(data).__name__}"
        )
    refuse_credentials(data, name)
    data = copy.deepcopy(data)
    for override in overrides:
        _apply_override(data, override)
    refuse_credentials(data, name)
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise InputError(_explain(error, name)) from None
    refuse_unbuilt(config, name)
    check_together(config, name)
    return config


def read_yaml(path: str) -> object:
    """Parse a local YAML file; errors name the file and the line."""
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        near = difflib.get_close_matches(
            os.path.basename(path), os.listdir(folder) if os.path.isdir(folder) else [], n=1
        )
        hint = f"; did you mean {os.path.join(folder, near[0])!r}?" if near else ""
        raise InputError(f"config file {path!r} does not exist{hint}")
    with open(path, encoding="utf-8") as file:
        try:
            return yaml.load(file, Loader=_Loader)
        except yaml.YAMLError as error:
            raise InputError(f"{path}: not valid YAML: {error}") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: expected UTF-8 text: {error}") from None


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which the library's own loader takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[Any, Any] = {}
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name in first and name not in (None, "<<"):
                raise yaml.constructor.ConstructorError(
                    "first", first[name], f"the key {name!r} is there twice", key.start_mark
                )
            first[name] = key.start_mark
        return super().construct_mapping(node, deep)


def refuse_unbuilt(config: Config, name: str = "config") -> None:
    """Raise `InputError` for the first value whose code is not part of this version."""
    for key, built in BUILT.items():
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        if value not in built:
            raise _unbuilt(name, key, value, built)


def _unbuilt(name: str, key: str, value: Any, built: tuple[object, ...]) -> InputError:
    listing = ", ".join("null" if b is None else repr(b) for b in built)
    shown = value.model_dump() if isinstance(value, BaseModel) else value
    return InputError(
        f"{name}: {key}: {shown!r} is not built yet in this version; built: {listing}"
    )


def dump_config(config: Config) -> str:
    """The resolved config as YAML, every default written out, ready to run again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    refuse_in_override(override)
    if not separator or not key.strip():
        raise InputError(
            f"--set {key!r}: expected KEY=VALUE, for example --set selection.budget=5%"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    put_value(data, key.strip(), value, f"--set {key}")


def put_value(data: dict[str, Any], key: str, value: Any, name: str) -> None:
    """Put a value under a dotted key, in place; `name` is what errors call the request.

    Raises:
        InputError: a part of the key holds a value that is no section.
    """
    node = data
    parts = key.split(".")
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise InputError(f"{name}: {part!r} holds {child!r}, not a section")
        node = child
    node[parts[-1]] = value


def _explain(error: ValidationError, name: str) -> str:
    lines = []
    for problem in error.errors():
        parts = _key_parts(problem)
        key = ".".join(parts) or "(top level)"
        if problem["type"] == "extra_forbidden":
            lines.append(f"{name}: unknown key {key!r}{_nearest(parts)}")
        elif problem["type"] == "missing":
            lines.append(f"{name}: {key!r} is missing; it has no default")
        else:
            found = _short(problem.get("input"))
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "model_type":
                message = f"expected a section of keys, for example {{{_first_key(parts)}: ...}}"
            lines.append(f"{name}: {key}: {message}; found {found}{_near_value(problem)}")
    return "\n".join(lines)


def _key_parts(problem: Any) -> list[str]:
    """The path of keys, without the type of a union that pydantic tried or its `[key]` mark."""
    parts: list[str] = []
    annotation: Any = Config
    for part in problem["loc"]:
        if part == "[key]" or isinstance(annotation, types.UnionType):
            break
        parts.append(str(part))
        annotation = _inside(annotation, part)
    return parts


def _inside(annotation: Any, key: object) -> Any:
    """The type of what stands under a key of a section, mapping or list; None if unknown."""
    if hasattr(annotation, "model_fields"):
        field = annotation.model_fields.get(str(key))
        inner = None if field is None else field.annotation
    else:
        inner = (typing.get_args(annotation) or (None,))[-1]
    choices = [choice for choice in typing.get_args(inner) if choice is not type(None)]
    # `X | None` is an X here: pydantic reports its problems as those of X.
    return choices[0] if isinstance(inner, types.UnionType) and len(choices) == 1 else inner


def _first_key(parts: list[str]) -> str:
    """A key of the section that these keys lead to, one without a default if there is any."""
    annotation: Any = Config
    for part in parts:
        annotation = _inside(annotation, part)
    known: dict[str, Any] = getattr(annotation, "model_fields", {})
    required = [name for name, field in known.items() if field.is_required()]
    return (required or list(known) or ["KEY"])[0]


def _nearest(parts: list[str]) -> str:
    annotation: Any = Config
    for part in parts[:-1]:
        annotation = _inside(annotation, part)
    names = list(getattr(annotation, "model_fields", {}))
    near = difflib.get_close_matches(parts[-1], names, n=1)
    if near:
        prefix = ".".join([*parts[:-1], near[0]])
        return f"; did you mean {prefix!r}?"
    return f"; expected one of: {', '.join(names)}" if names else ""


def _near_value(problem: Any) -> str:
    if problem["type"] != "literal_error" or not isinstance(problem.get("input"), str):
        return ""
    choices: Iterable[str] = re.findall(r"'([^']+)'", str(problem["ctx"]["expected"]))
    near = difflib.get_close_matches(problem["input"], list(choices), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _short(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
