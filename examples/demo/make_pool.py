"""Make the demo's data: a labelled pool of reasoning-gym families, and held-out word problems.

    python examples/demo/make_pool.py FOLDER

writes FOLDER/pool.parquet (columns id, source, messages) and FOLDER/target.jsonl.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import reasoning_gym

FAMILIES = (
    "gsm_symbolic",
    "leg_counting",
    "chain_sum",
    "basic_arithmetic",
    "simple_equations",
    "fraction_simplification",
    "number_sorting",
    "letter_counting",
    "spell_backward",
    "caesar_cipher",
    "syllogism",
    "family_relationships",
)
ROWS_PER_FAMILY = 50
TARGET_FAMILY = "gsm_symbolic"
TARGET_ROWS = 40


def samples(family: str, count: int, seed: int) -> list[dict[str, object]]:
    """`count` samples of a family as chats, with their family as source."""
    data = reasoning_gym.create_dataset(family, size=count, seed=seed)
    return [
        {
            "id": f"{family}-{seed}-{index}",
            "source": family,
            "messages": [
                {"role": "user", "content": entry["question"].strip()},
                {"role": "assistant", "content": f"The answer is {entry['answer']}."},
            ],
        }
        for index, entry in enumerate(data)
    ]


def main(folder: Path) -> None:
    """Write the pool and the target; the target's seed is not the pool's."""
    folder.mkdir(parents=True, exist_ok=True)
    pool = [row for family in FAMILIES for row in samples(family, ROWS_PER_FAMILY, seed=1)]
    pq.write_table(pa.Table.from_pylist(pool), folder / "pool.parquet")
    target = samples(TARGET_FAMILY, TARGET_ROWS, seed=2)
    lines = (json.dumps(row) for row in target)
    (folder / "target.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{len(pool)} candidates, {len(target)} target rows in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
