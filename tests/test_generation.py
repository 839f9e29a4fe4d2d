"""Generated answers against a loop without batches or a cache; final answers compared."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from retraining_oracle import prepared
from tiny_run import Setup, conversation, sentence

from influence.cache import Cache
from influence.candidates import read_examples, scan_files
from influence.config import ModelConfig
from influence.config_retraining import HeldOutTest
from influence.exact_match import same_answer
from influence.generation import Question, generate_answers, make_questions
from influence.replica import load_replica, load_tokenizer
from influence.retraining import (
    Training,
    read_tests,
    retraining_units,
    run_retrainings,
    scan_tests,
)


@pytest.mark.parametrize(
    ("generated", "reference", "same"),
    [
        ("so 3 x 24 = 72.\n#### 72", "24 + 48\n#### 72", True),
        ("#### 72 apples, of 80", "#### 72", True),
        ("The answer is 72.", "#### 72", True),
        ("72, and then 9", "#### 72", False),
        ("$1,250.50", "#### 1250.5", True),
        ("it is 1,250", "#### 1,250", True),
        ("-3", "#### 3", False),
        ("5 - 8 = -3", "#### -3", True),
        ("9 - 3", "#### -3", False),
        ("none", "#### 72", False),
        ("", "#### 0", False),
        ("72.0", "#### 72", True),
        ("  a  b\n", "a b", True),
        ("A b.", "a b", True),
        ("a. b", "a b", False),
        ("72", "seventy-two", False),
        ("3 x 24 makes 72.\nSo the answer is 72.", "24 + 48.\nSo the answer is 72.", True),
        ("The answer is 71: not 72.", "So the answer is 72.", False),
        ("Answer is 9. No, the answer is $72, of 80", "**Answer:** 72 apples", True),
        (r"hence \boxed{72} and 9", r"\boxed{72}", True),
        ("72", "The answer is 72 apples.", True),
        ("Yes, by 2.", "the answer is yes, as 3 > 2", False),
        ("Hence the answer is (B).", "(B)", True),
        ("True.", "True", True),
        ("not True", "True", False),
        (") )", "", False),
        (") )", ") ]", False),
        ("the answer is ) ) ].", ") ) ]", True),
        ("(", ")", False),
        ("!", "?", False),
        ("The answer is \u22125", "#### 5", False),
        ("The answer is \u22125", "#### -5", True),
        ("#### -5", "#### \u22125", True),
        ("\u2212x", "-x", True),
        ("the answer is\nno", "no", False),
        ("say x", "#### x", False),
        ("#### x", "#### x", True),
        (r"\boxed{1/3}", r"\boxed{1/2}", False),
        (r"so it is \boxed{1/2}", r"half: \boxed{1/2}", True),
        (r"\boxed{1/2}", r"\boxed{1}", False),
        (r"\boxed{1}", r"\boxed{1/2}", False),
        (r"thus \boxed{\frac{1}{2}}", r"a half, \boxed{\frac{1}{2}}", True),
        (r"\boxed{\frac{1}{3}}", r"\boxed{\frac{1}{2}}", False),
        (r"\boxed{7} or \boxed{\frac{1}{2}", r"\boxed{7}", True),
        ("the answer is 05/02/2021", "the answer is 05/01/2021", False),
        ("#### 3:45", "#### 3:30", False),
        ("The answer is 3:30.", "#### 3:30", True),
        ("#### 10^6", "#### 10^5", False),
        ("#### 2x+7", "#### 2x+1", False),
        ("#### 3 - y", "#### 3 - x", False),
        ("the answer is **72** apples.", "**Answer:** **72** pears", True),
        ("the answer is 40%.", "#### 40 %", True),
    ],
)
def test_final_answers_are_compared(generated: str, reference: str, same: bool) -> None:
    assert same_answer(generated, reference) is same


def greedy_by_hand(model: Any, tokenizer: Any, prompt: list[int], new: int) -> str:
    """The whole text through the model for every token, without a cache or a batch."""
    ids = list(prompt)
    for _ in range(new):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def loaded(setup: Setup) -> tuple[Any, Any]:
    config = ModelConfig(name=str(setup.model))  # pyright: ignore[reportCallIssue]
    return load_replica(config, "float32", "cpu").model, load_tokenizer(config)


@pytest.mark.parametrize("token_budget", [1, 100, 10_000])
def test_batches_padded_on_the_left_give_the_answers_of_one_row_at_a_time(
    loaded: tuple[Any, Any], token_budget: int
) -> None:
    """Whatever the model's own settings say of sampling and penalties."""
    model, tokenizer = loaded
    draw = random.Random("questions")
    texts = [sentence(draw, low, low + 3) for low in (2, 9, 4, 14, 3)]
    questions = [Question(tokenizer(text)["input_ids"], "") for text in texts]
    before = model.generation_config.to_dict()
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0)
    try:
        found = generate_answers(
            model, tokenizer, questions, max_new_tokens=12, token_budget=token_budget
        )
    finally:
        model.generation_config.update(**before)
    expected = [greedy_by_hand(model, tokenizer, q.prompt, 12) for q in questions]
    assert found == expected, "padding, the order of batches, or sampling changes an answer"
    assert len(set(found)) > 1, "the questions are too much alike to tell"


def test_an_answer_ends_with_its_turn(loaded: tuple[Any, Any]) -> None:
    """With an end that the first answer begins with: it is over, and the other one goes on."""
    model, tokenizer = loaded
    texts = ("add seven", "stone under the river")
    questions = [Question(tokenizer(text)["input_ids"], "") for text in texts]
    how = {"max_new_tokens": 8, "token_budget": 1000}
    whole = generate_answers(model, tokenizer, questions, **how)
    first, second = (
        int(model(input_ids=torch.tensor([q.prompt])).logits[0, -1].argmax()) for q in questions
    )
    assert first != second
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [first]
    try:
        ended = generate_answers(model, tokenizer, questions, **how)
    finally:
        model.generation_config.eos_token_id = before
    assert ended[0] == tokenizer.decode([first])
    assert whole[0] != ended[0]
    assert ended[1].startswith(tokenizer.decode([second]))


def test_questions_end_where_the_last_answer_begins(setup: Setup, tmp_path: Path) -> None:
    draw = random.Random("turns")
    turns = conversation(draw, turns=2)
    rows: list[Any] = [
        {"messages": turns},
        {"messages": turns[:1]},
        {"messages": turns[1:2]},
        {"text": "of no known form"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (file,) = scan_files([str(path)])
    tokenizer = load_tokenizer(ModelConfig(name=str(setup.model)))  # pyright: ignore
    found = make_questions(tokenizer, read_examples(file, 0, 3), 512)
    assert found[1:] == [None, None, None]
    assert found[0] is not None
    assert found[0].reference == turns[3]["content"]
    text = tokenizer.apply_chat_template(turns[:3], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(found[0].prompt) == text
    length = len(found[0].prompt)
    assert make_questions(tokenizer, read_examples(file, 0, 0), length)[0] == found[0]
    assert make_questions(tokenizer, read_examples(file, 0, 0), length - 1) == [None]


def test_a_unit_says_which_answers_are_right(
    setup: Setup, loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    """The model's own answers as references, but for one row: all others are right."""
    model, tokenizer = loaded
    draw = random.Random("own answers")
    rows: list[dict[str, Any]] = []
    for _ in range(5):
        user = {"role": "user", "content": sentence(draw)}
        text = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = greedy_by_hand(model, tokenizer, prompt, 10)
        rows.append({"messages": [user, {"role": "assistant", "content": answer}]})
    rows[2]["messages"][1]["content"] = "another answer"
    rows.append({"messages": rows[0]["messages"][:1]})
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = prepared(setup, tmp_path / "run")
    asked: dict[str, Any] = {"path": str(path), "exact_match": True, "max_new_tokens": 10}
    sums: dict[str, Any] = {"path": setup.targets["sums"]["path"]}
    tests = scan_tests("tests", {"own": HeldOutTest(**asked), "sums": HeldOutTest(**sums)})
    trainings = [Training([]), Training(list(range(16)), seed=1)]
    units = retraining_units(made.job, made.reduce, trainings, tests)
    run_retrainings(made.job, units)
    cache = Cache(made.config.cache_url)
    found = read_tests(cache, units, "correct")
    assert found["own"][0, :5].tolist() == [1, 1, 0, 1, 1]
    assert np.isnan(found["own"][:, 5]).all()
    assert np.isnan(found["sums"]).all(), "answers that nobody asked for"
    assert np.isfinite(read_tests(cache, units, "loss")["sums"]).all()
    plain = {name: HeldOutTest(path=each.files[0].url) for name, each in tests.items()}  # pyright: ignore
    other = retraining_units(made.job, made.reduce, trainings, scan_tests("tests", plain))
    assert not {unit.key for unit in other} & {unit.key for unit in units}
