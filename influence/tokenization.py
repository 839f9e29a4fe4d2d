"""Conversations to token ids and the mask of the tokens a model is trained to produce."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Bool, Int32

from influence.candidates import Example
from influence.chat_spans import (
    Render,
    Span,
    as_dicts,
    chat_template,
    has_generation_markers,
    make_render,
    response_spans,
)
from influence.errors import InputError

REFUSED = "chat template refused the turns"
CUT_OFF = "no response tokens within max_length"
NOTHING_MARKED = "no response tokens"


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """One row as tokens; `n_tokens` and `n_response_tokens` count after truncation.

    `response_mask` is True where the token belongs to an assistant turn (its end-of-turn token
    included) and can be predicted, which the first token cannot. A row with a `reason` that came
    with it, or that the template refused, has no tokens.
    """

    row: int
    id: str | None
    source: str | None
    group: str | None
    digest: bytes
    input_ids: Int32[np.ndarray, " t"]
    response_mask: Bool[np.ndarray, " t"]
    n_tokens: int
    n_response_tokens: int
    truncated: bool
    reason: str | None


@dataclass(frozen=True, slots=True)
class _Tokens:
    ids: Sequence[int]
    mask: Sequence[bool] | np.ndarray


#: Which tokens count in a sample's loss.
LOSS_ON = ("response", "all")

Encoder = Callable[[Sequence[Example]], list[Encoded]]


def make_encoder(tokenizer: Any, max_length: int, loss_on: str = "response") -> Encoder:
    """A function from examples to encoded rows, in order.

    The text is the tokenizer's chat template. Every assistant turn is response: as the template's
    `{% generation %}` markers say, else by comparing renderings of the first turns. A token is
    response if its last character lies in a response, so that a space merged into the first word
    goes with the word. With `loss_on="all"` every token is. At most `max_length` tokens are kept,
    the first ones. A date that the template prints is fixed (26 Jul 2024).

    Raises:
        InputError: the tokenizer has no chat template, the template is broken (here or at the
            first row), or it renders a turn differently once others follow.
        ValueError: `max_length` is not positive, or `loss_on` neither "response" nor "all".
    """
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, not {max_length}")
    if loss_on not in LOSS_ON:
        raise ValueError(f"loss_on must be one of {', '.join(LOSS_ON)}, not {loss_on!r}")
    template = chat_template(tokenizer)
    render = make_render(tokenizer, template)
    marked = has_generation_markers(template)
    if marked and not tokenizer.is_fast:
        raise InputError(
            "model.name: a chat template with {% generation %} needs a fast tokenizer; "
            "save one (tokenizer.json) beside the model, or use a template without the markers"
        )

    def encode(examples: Sequence[Example]) -> list[Encoded]:
        readable = [example for example in examples if example.reason is None]
        if marked:
            tokens = [_marked(tokenizer, template, example) for example in readable]
        else:
            tokens = _unmarked(tokenizer, render, readable)
        if loss_on == "all":
            tokens = [None if each is None else _whole(each) for each in tokens]
        found = {id(example): each for example, each in zip(readable, tokens, strict=True)}
        return [_encoded(example, found.get(id(example)), max_length) for example in examples]

    return encode


def template_fingerprint(tokenizer: Any) -> str:
    """Hash (32 hex digits) of what turns a conversation into ids.

    Vocabulary, merges, normalisation, added and special tokens, and the chat template; not the
    padding and truncation that a tokenizer was last used with.
    """
    parts: dict[str, Any] = {
        "template": chat_template(tokenizer),
        "special": {k: str(v) for k, v in sorted(tokenizer.special_tokens_map.items())},
    }
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        parts["backend"] = {k: v for k, v in backend.items() if k not in ("padding", "truncation")}
    else:
        parts["backend"] = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
        parts["added"] = sorted((i, str(t)) for i, t in tokenizer.added_tokens_decoder.items())
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode("ascii"), digest_size=16).hexdigest()


def _whole(tokens: _Tokens) -> _Tokens:
    return _Tokens(tokens.ids, np.ones(len(tokens.ids), dtype=bool))


def _encoded(example: Example, tokens: _Tokens | None, max_length: int) -> Encoded:
    reason = example.reason or (REFUSED if tokens is None else None)
    ids = np.asarray(tokens.ids if tokens else [], dtype=np.int32)
    mask = np.array(tokens.mask if tokens else [], dtype=bool)
    mask[:1] = False  # nothing stands before the first token to predict it from
    truncated = len(ids) > max_length
    kept = mask[:max_length]
    if reason is None and not kept.any():
        reason = CUT_OFF if mask.any() else NOTHING_MARKED
    return Encoded(
        row=example.row,
        id=example.id,
        source=example.source,
        group=example.group,
        digest=example.digest,
        input_ids=ids[:max_length].copy(),
        response_mask=kept.copy(),
        n_tokens=min(len(ids), max_length),
        n_response_tokens=int(kept.sum()),
        truncated=truncated,
        reason=reason,
    )


def _marked(tokenizer: Any, template: str, example: Example) -> _Tokens | None:
    """Ids and mask by the template's own markers; None if it refuses the turns."""
    try:
        out = tokenizer.apply_chat_template(
            as_dicts(example.messages),
            chat_template=template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
    except jinja2.TemplateSyntaxError as error:
        raise _broken(error) from error
    except jinja2.TemplateError:
        return None
    return _Tokens(out["input_ids"], np.asarray(out["assistant_masks"], dtype=bool))


def _unmarked(tokenizer: Any, render: Render, examples: Sequence[Example]) -> list[_Tokens | None]:
    """Ids and masks by prefixes of the rendered text; None for a row the template refuses."""
    rendered = [_spans(example, render) for example in examples]
    kept = [each for each in rendered if each is not None]
    if tokenizer.is_fast:
        tokens = iter(_by_offsets(tokenizer, kept))
    else:
        tokens = (_by_token_prefix(tokenizer, text, spans) for text, spans in kept)
    return [None if each is None else next(tokens) for each in rendered]


def _spans(example: Example, render: Render) -> tuple[str, list[Span]] | None:
    try:
        return response_spans(example.messages, render)
    except jinja2.TemplateSyntaxError as error:
        raise _broken(error) from error
    except jinja2.TemplateError:
        return None
    except InputError as error:
        raise InputError(f"{example.url} row {example.row}: {error}") from error


def _by_offsets(tokenizer: Any, rendered: list[tuple[str, list[Span]]]) -> list[_Tokens]:
    """One tokenisation of all texts; a token is response if its last character is."""
    if not rendered:
        return []
    out = tokenizer(
        [text for text, _ in rendered],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        padding=False,
        truncation=False,
        verbose=False,
    )
    tokens = []
    for ids, offsets, (_, spans) in zip(
        out["input_ids"], out["offset_mapping"], rendered, strict=True
    ):
        ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)[:, 1]
        mask = np.zeros(len(ids), dtype=bool)
        for start, end in spans:
            mask |= (ends > start) & (ends <= end)
        tokens.append(_Tokens(ids, mask))
    return tokens


def _by_token_prefix(tokenizer: Any, text: str, spans: list[Span]) -> _Tokens:
    """Without offsets: count the tokens of the text before each border of a response."""

    def ids_of(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]

    ids = ids_of(text)
    mask = np.zeros(len(ids), dtype=bool)
    for span in spans:
        prefixes = [ids_of(text[:border]) for border in span]
        for border, prefix in zip(span, prefixes, strict=True):
            if ids[: len(prefix)] != prefix:
                raise InputError(
                    f"model.name: this tokenizer gives no offsets and merges tokens across "
                    f"character {border} of a rendered row, where a response begins or ends; "
                    "use a fast tokenizer (tokenizer.json)"
                )
        mask[len(prefixes[0]) : len(prefixes[1])] = True
    return _Tokens(ids, mask)


def _broken(error: jinja2.TemplateSyntaxError) -> InputError:
    return InputError(
        f"model.name: the tokenizer's chat template is no valid Jinja ({error}); correct it"
    )
