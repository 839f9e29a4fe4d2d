"""Which characters of a rendered conversation are an assistant's own words."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jinja2

from influence.candidates import Message
from influence.errors import InputError

Span = tuple[int, int]
Render = Callable[[Sequence[Message], bool], str]
# Templates that print today's date would give a row other tokens tomorrow, and no cached number
# would ever be found again. The day is the default of the published Llama 3 templates.
_DATE = {"d": "26", "b": "Jul", "B": "July", "m": "07", "Y": "2024", "y": "24"}
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chat_template(tokenizer: Any) -> str:
    """The tokenizer's default chat template, with the date it may print held fixed.

    Raises:
        InputError: there is none.
    """
    try:
        template = tokenizer.get_chat_template()
    except (ValueError, AttributeError):
        template = None
    if not template:
        raise InputError(
            f"model.name: the tokenizer of {getattr(tokenizer, 'name_or_path', '?')!r} has no chat "
            "template; use the instruction-tuned model's tokenizer, or save one with "
            "`tokenizer.chat_template` set beside the model"
        )
    if "strftime_now" not in template:
        return template
    date = "format" + "".join(f" | replace('%{k}', '{v}')" for k, v in _DATE.items())
    fixed = f"{{%- macro strftime_now(format) -%}}{{{{- {date} -}}}}{{%- endmacro -%}}"
    return fixed + template


def has_generation_markers(template: str) -> bool:
    """Whether the template marks the assistant's text with `{% generation %}`."""
    return _GENERATION.search(template) is not None


def as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages in the form that chat templates take."""
    return [{"role": message.role, "content": message.content} for message in messages]


def make_render(tokenizer: Any, template: str) -> Render:
    """A function (messages, add_generation_prompt) -> text."""

    def render(messages: Sequence[Message], prompt: bool) -> str:
        return tokenizer.apply_chat_template(
            as_dicts(messages), chat_template=template, tokenize=False, add_generation_prompt=prompt
        )

    return render


def response_spans(messages: Sequence[Message], render: Render) -> tuple[str, list[Span]]:
    """The rendered conversation and the character span [start, end) of each assistant turn.

    A turn starts where the rendering of the turns before it, with a generation prompt, ends
    (without one where the template's prompt is no part of the whole), and ends where the rendering
    through it ends, less white space behind an end-of-turn marker, which no model has to produce.

    Raises:
        jinja2.TemplateError: the template refuses this order of roles.
        InputError: a rendering of the first turns is no prefix of the whole.
    """
    text = render(messages, False)
    spans = []
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        through = text if i == len(messages) - 1 else render(messages[: i + 1], False)
        if not text.startswith(through):
            raise _ambiguous(i)
        start = _start(messages[:i], message, text[: len(through)], render)
        if start is None:
            raise _ambiguous(i)
        spans.append((start, start + _turn_length(text[start : len(through)], message.content)))
    return text, spans


def _start(before: Sequence[Message], turn: Message, through: str, render: Render) -> int | None:
    """Where a turn starts in `through`, the text up to its end; None if that cannot be told."""
    refused = not before  # apply_chat_template takes no empty conversation
    for prompt in (True, False):
        if refused:
            break
        try:
            prefix = render(before, prompt)
        except jinja2.TemplateError:
            refused = True
        else:
            if through.startswith(prefix):
                return len(prefix)
    if not refused:
        return None
    # Nothing can be rendered before this turn: its text is the last of its kind in `through`.
    found = through.rfind(turn.content.strip())
    return found if found >= 0 else None


def _turn_length(turn: str, content: str) -> int:
    """Length of a turn without the white space behind its end-of-turn marker.

    Where no marker follows the content, white space is all that ends the turn, and stays.
    """
    stripped = turn.rstrip()
    unmarked = bool(content.strip()) and stripped.endswith(content.rstrip())
    return len(turn) if unmarked else len(stripped)


def _ambiguous(turn: int) -> InputError:
    return InputError(
        f"the chat template renders turn {turn} (from 0) differently when other turns follow it, "
        "so the assistant's part cannot be located; use a template that marks it with "
        "{% generation %} ... {% endgeneration %}, or candidates of one exchange each"
    )
