"""The row formats that instruction data come in, each read by one small function.

`messages` (role, content), ShareGPT `conversations` (from, value), `prompt` + `completion`, and
`instruction` (+ `input`) + `output` or `response`. A row with several is read as the first of
these that is not null. Rows that cannot be read get a short reason from a fixed set, so that a
report can count them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
COLUMNS = (
    "messages",
    "conversations",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "response",
)
#: What messages ask for where no row can be used.
EXPECTED = (
    "rows with `messages` or `conversations` (a list of turns), `prompt` and `completion`, or "
    "`instruction` and `output` or `response`, and an assistant's response within max_length"
)
_SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    **{role: role for role in ROLES},
}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: who speaks (system, user, assistant or tool) and the text."""

    role: str
    content: str


class _UnreadableRow(Exception):
    """Carries the reason out of the readers."""


def parse_row(row: Mapping[str, Any]) -> tuple[tuple[Message, ...], str | None]:
    """The turns of a row and None, or what could be read of it and why it cannot be used."""
    messages: tuple[Message, ...] = ()
    try:
        messages = _read(row)
        _check(messages)
    except _UnreadableRow as unreadable:
        return messages, str(unreadable)
    return messages, None


def _read(row: Mapping[str, Any]) -> tuple[Message, ...]:
    for columns, read in _FORMATS:
        if all(row.get(name) is not None for name in columns):
            return read(row)
    raise _UnreadableRow("malformed: no recognised columns")


def _check(messages: tuple[Message, ...]) -> None:
    if not messages:
        raise _UnreadableRow("malformed: empty messages")
    answers = [message.content for message in messages if message.role == "assistant"]
    if not answers:
        raise _UnreadableRow("no assistant turn")
    if not any(answer.strip() for answer in answers):
        raise _UnreadableRow("empty response")


def _turns(value: Any) -> tuple[Message, ...]:
    """A list of {role, content} or {from, value} mappings; both spellings occur in both columns."""
    if not isinstance(value, list | tuple):
        raise _UnreadableRow("malformed: messages is not a list")
    return tuple(_turn(item) for item in value)


def _turn(item: Any) -> Message:
    if not isinstance(item, Mapping):
        raise _UnreadableRow("malformed: a turn is not an object")
    role = item.get("role")
    if role is None:
        speaker = item.get("from")
        role = _SHAREGPT.get(speaker) if isinstance(speaker, str) else None
        content = item.get("value")
    else:
        content = item.get("content")
    if role not in ROLES:
        raise _UnreadableRow("malformed: unknown role")
    return Message(role, _text(content))


def _text(value: Any) -> str:
    """Text as it is, or the joined text parts of a list of {type: text, text: ...}."""
    if isinstance(value, list | tuple):
        parts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
            for part in value
        ]
        value = "".join(parts) if all(isinstance(part, str) for part in parts) else None  # type: ignore[arg-type]
    if not isinstance(value, str):
        raise _UnreadableRow("malformed: content is not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which no tokenizer accepts
        raise _UnreadableRow("malformed: invalid unicode") from None
    return value


def _side(value: Any, role: str) -> tuple[Message, ...]:
    """One side of a prompt/completion pair: plain text, or turns of its own."""
    is_turns = isinstance(value, list | tuple) and any(
        isinstance(item, Mapping) and ("role" in item or "from" in item) for item in value
    )
    return _turns(value) if is_turns else (Message(role, _text(value)),)


def _prompt_completion(row: Mapping[str, Any]) -> tuple[Message, ...]:
    return _side(row["prompt"], "user") + _side(row["completion"], "assistant")


def _instruction(row: Mapping[str, Any], answer: str) -> tuple[Message, ...]:
    """The optional `input` follows the instruction after an empty line."""
    instruction = _text(row["instruction"])
    context = _text(row["input"]) if row.get("input") is not None else ""
    asked = f"{instruction}\n\n{context}" if context.strip() else instruction
    return Message("user", asked), Message("assistant", _text(row[answer]))


_Reader = Callable[[Mapping[str, Any]], tuple[Message, ...]]
_FORMATS: tuple[tuple[tuple[str, ...], _Reader], ...] = (
    (("messages",), lambda row: _turns(row["messages"])),
    (("conversations",), lambda row: _turns(row["conversations"])),
    (("prompt", "completion"), _prompt_completion),
    (("instruction", "output"), lambda row: _instruction(row, "output")),
    (("instruction", "response"), lambda row: _instruction(row, "response")),
)
