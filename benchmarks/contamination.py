"""How fast candidates are compared with target rows, and which changed target rows are found.

    python benchmarks/contamination.py --data POOL/*.parquet --target NAME=FILE ... [--limit ROWS]

Three tables as JSON: rows a second of one core with the pool's matches; matches between the target
files themselves (rows of the second one against the first); the share of a file's own rows, changed
in different ways, that are found.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

from common import named_paths

from influence.candidates import read_examples, scan_files
from influence.config_contamination import ContaminationConfig
from influence.near_duplicates import NearDuplicates
from influence.normal_text import Views, views
from influence.row_formats import Message

ROWS = 512
LETTERS = "abcdefghijklmnopqrstuvwxyz"
Pair = tuple[str, str]


def index_of(rows: Sequence[Views]) -> NearDuplicates:
    """An index with the config's defaults."""
    config = ContaminationConfig()  # pyright: ignore[reportCallIssue]
    return NearDuplicates(rows, ngram=config.ngram, overlap=config.overlap, jaccard=config.jaccard)


def pairs_of(path: str) -> list[Pair]:
    """(question, answer) of every row of a file."""
    (file,) = scan_files([path])
    return [
        (example.messages[0].content, example.messages[-1].content)
        for example in read_examples(file, 0, file.rows - 1)
    ]


def row(question: str, answer: str) -> Views:
    """The words of a question and its answer."""
    return views([Message("user", question), Message("assistant", answer)])


def of_pool(data: Sequence[str], targets: Sequence[Views], limit: int | None) -> dict[str, Any]:
    """Seconds of one core for each step, and the matches by kind."""
    seconds, kinds, count = Counter(), Counter(), 0
    start = time.process_time()
    index = index_of(targets)
    seconds["index"] = time.process_time() - start
    for file in scan_files(data, limit):
        for first in range(0, file.rows, ROWS):
            laps = [time.process_time()]
            examples = read_examples(file, first, min(first + ROWS, file.rows) - 1)
            laps.append(time.process_time())
            texts = [views(example.messages) for example in examples]
            laps.append(time.process_time())
            found = list(index.matches(texts))
            laps.append(time.process_time())
            for step, name in enumerate(("read", "normalise", "compare")):
                seconds[name] += laps[step + 1] - laps[step]
            kinds.update(match.kind for match in found if match is not None)
            count += len(texts)
    whole = sum(seconds.values()) - seconds["index"]
    return {
        "rows": count,
        "target_rows": len(targets),
        "rows_per_second": count / whole,
        "microseconds_a_row": {n: 1e6 * s / count for n, s in seconds.items() if n != "index"},
        "index_seconds": seconds["index"],
        "matches": dict(kinds),
    }


def _mistyped(text: str, every: int) -> str:
    draw, letters = random.Random(every), list(text)
    for place in range(every // 2, len(letters), every):
        if letters[place].isalpha():
            letters[place] = draw.choice(LETTERS)
    return "".join(letters)


CHANGES: dict[str, Callable[[str, str], Pair]] = {
    "another answer": lambda question, answer: (question, "I do not know."),
    "inside a longer prompt": lambda question, answer: (
        f"Solve the following task, and explain each step. {question} Answer in one line.",
        "So be it.",
    ),
    "quoted in an answer": lambda question, answer: ("An example?", f"{question} {answer}"),
    "a letter in 80 changed": lambda question, answer: (_mistyped(question, 80), "x"),
    "a letter in 40 changed": lambda question, answer: (_mistyped(question, 40), "x"),
    "a letter in 20 changed": lambda question, answer: (_mistyped(question, 20), "x"),
    "the first half": lambda question, answer: (question[: len(question) // 2], "x"),
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--target", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    pairs = {n: pairs_of(p) for n, p in named_paths(arguments.target, "--target").items()}
    rows = {name: [row(*pair) for pair in members] for name, members in pairs.items()}
    document: dict[str, Any] = {
        "pool": of_pool(
            arguments.data, [r for each in rows.values() for r in each], arguments.limit
        )
    }
    between, planted = {}, {}
    for first, second in permutations(rows, 2):
        found = index_of(rows[first]).matches(rows[second])
        between[f"{second} against {first}"] = dict(Counter(m.kind for m in found if m))
    for name, members in pairs.items():
        index = index_of(rows[name])
        planted[name] = {
            change: sum(
                match is not None
                for match in index.matches([row(*make(*pair)) for pair in members])
            )
            / len(members)
            for change, make in CHANGES.items()
        }
    print(json.dumps({**document, "between": between, "planted": planted}, indent=1))


if __name__ == "__main__":
    main()
