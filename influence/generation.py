"""Greedy answers to the prompts of rows, in batches that are padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import torch

from influence.candidates import Example
from influence.chat_spans import Render, chat_template, make_render


@dataclass(frozen=True)
class Question:
    """A row's prompt as tokens, and the answer that stands in the row."""

    prompt: list[int]
    reference: str


def make_questions(
    tokenizer: Any, examples: Sequence[Example], max_length: int
) -> list[Question | None]:
    """The turns before the last assistant turn, with the template's generation prompt.

    None for a row that has no such turn, that the template refuses, or whose prompt is longer than
    `max_length`.
    """
    render = make_render(tokenizer, chat_template(tokenizer))
    found = [_question(tokenizer, render, example) for example in examples]
    return [None if q is None or len(q.prompt) > max_length else q for q in found]


def _question(tokenizer: Any, render: Render, example: Example) -> Question | None:
    turns = [i for i, message in enumerate(example.messages) if message.role == "assistant"]
    if example.reason is not None or not turns or turns[-1] == 0:
        return None
    try:
        text = render(example.messages[: turns[-1]], True)
    except jinja2.TemplateError:
        return None
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return Question(list(ids), example.messages[turns[-1]].content)


def generate_answers(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    token_budget: int,
) -> list[str]:
    """The most likely next token, again and again, until a turn ends or `max_new_tokens`.

    What the model's own generation settings say of sampling, beams and penalties does not count.
    Prompts of similar length share a batch, so that rows x (longest prompt + new tokens) stay
    within `token_budget`; a row alone may exceed it.
    """
    answers = [""] * len(questions)
    settings = _settings(model, tokenizer, max_new_tokens)
    device = next(model.parameters()).device
    for group in _groups([len(q.prompt) for q in questions], max_new_tokens, token_budget):
        width = max(len(questions[i].prompt) for i in group)
        ids = torch.full((len(group), width), settings.pad_token_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, place in enumerate(group):
            prompt = questions[place].prompt
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        with torch.no_grad():
            out = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
            )
        texts = tokenizer.batch_decode(out[:, width:].cpu(), skip_special_tokens=True)
        for place, text in zip(group, texts, strict=True):
            answers[place] = text
    return answers


def _settings(model: Any, tokenizer: Any, max_new_tokens: int) -> Any:
    from transformers import GenerationConfig

    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    if tokenizer.eos_token_id is not None:
        ends.append(tokenizer.eos_token_id)
    pad = tokenizer.pad_token_id
    # What is None here is taken from the model's own settings.
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(set(ends)) or None,
        pad_token_id=pad if pad is not None else min(ends, default=0),
    )


def _groups(lengths: Sequence[int], new: int, token_budget: int) -> list[list[int]]:
    """Places by length, longest first, in batches within the budget."""
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and (len(groups[-1]) + 1) * (longest + new) <= token_budget:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups
