"""A tiny model on disk, a tiny pool with every kind of trouble in it, and readers of results."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from influence import storage
from influence.config import Config
from influence.config_loading import dump_config, parse_config
from influence.records import Manifest
from influence.run_log import read_manifest

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = (
    *("add", "take", "seven", "nine", "apples", "river", "boat", "stone", "green", "light"),
    *("count", "under", "above", "twelve", "half", "proof", "lemma", "bread", "oven", "knife"),
    *("salt", "loop", "index", "array", "cache", "thread", "north", "south", "winter", "step"),
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SOURCES = ("maths", "prose", "code")

#: Rows of the pool that cannot be scored, by reason, duplicates among them.
POOL_ROWS = 72
UNSCORABLE = {
    "duplicate": 4,
    "malformed json": 1,
    "no assistant turn": 1,
    "empty response": 1,
    "malformed: no recognised columns": 1,
}
N_SCORED = POOL_ROWS - sum(UNSCORABLE.values())


Runner = Callable[..., str]
"""run(**changes) -> the run directory; see the fixture `run`."""


@dataclass(frozen=True)
class Setup:
    """Where the inputs of a tiny run are: model folder, inputs' folder, pool globs, targets."""

    model: Path
    folder: Path
    candidates: list[str]
    targets: dict[str, dict[str, Any]]


def sentence(draw: random.Random, low: int = 3, high: int = 14) -> str:
    """Some random words."""
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(low, high)))


def conversation(draw: random.Random, turns: int = 1) -> list[dict[str, str]]:
    """`turns` questions with their answers."""
    return [
        {"role": role, "content": sentence(draw)}
        for _ in range(turns)
        for role in ("user", "assistant")
    ]


def save_model(folder: Path, seed: int = 0) -> Path:
    """Save a random Llama (float32, hidden 32, 3 layers) and its tokenizer; returns the folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    draw = random.Random(seed)
    tokenizer.train_from_iterator([sentence(draw) for _ in range(50)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[2], pad_token=SPECIAL[0]
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).float().save_pretrained(folder)
    return folder


def save_adapter(folder: Path, model: Path, seed: int = 3) -> str:
    """Save a LoRA (rank 3, every linear layer of the blocks, B not zero) of a saved model."""
    from tiny_models import with_lora
    from transformers import AutoModelForCausalLM

    with_lora(AutoModelForCausalLM.from_pretrained(model), seed=seed).save_pretrained(folder)
    return str(folder)


def write_pool(folder: Path, seed: int = 1) -> list[str]:
    """40 Parquet rows and 32 JSONL rows, some duplicated, some not to be scored; returns globs."""
    draw = random.Random(seed)
    rows = [
        {
            "id": f"a{i:02d}",
            "source": SOURCES[i % 2],
            "messages": conversation(draw, turns=1 + (i % 5 == 0)),
            "extra": i,
        }
        for i in range(40)
    ]
    rows[17]["messages"] = rows[3]["messages"]  # a duplicate within a shard's neighbourhood
    rows[39]["messages"] = rows[0]["messages"]  # and one in another shard
    pool = folder / "pool"
    pool.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), pool / "a.parquet", row_group_size=13)
    lines: list[Any] = [
        {"source": SOURCES[2], "prompt": sentence(draw), "completion": sentence(draw)}
        for _ in range(26)
    ]
    lines += [
        lines[4],  # a duplicate within its file
        {
            "conversations": [
                {"from": "human" if turn["role"] == "user" else "gpt", "value": turn["content"]}
                for turn in rows[5]["messages"]
            ]
        },  # a duplicate across files and formats
        {"messages": [{"role": "user", "content": "no answer"}]},
        {"prompt": "nothing", "completion": "  "},
        {"text": "of no known form"},
    ]
    text = [json.dumps(line) for line in lines]
    text.insert(9, '{"prompt": "cut')
    (pool / "b.jsonl").write_text("\n".join(text) + "\n")
    return [str(pool / "*")]


def write_targets(folder: Path, seed: int = 2) -> dict[str, dict[str, Any]]:
    """Target `sums` (5 rows) and target `mixed` (6 rows in 2 groups of column `family`)."""
    targets: dict[str, dict[str, Any]] = {}
    for name, count, extra in (("sums", 5, {}), ("mixed", 6, {"group_by": "family"})):
        draw = random.Random(f"{seed} {name}")
        lines = [
            {"id": f"{name}{i}", "family": ("x", "y")[i % 2], "messages": conversation(draw)}
            for i in range(count)
        ]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        targets[name] = {"path": str(path), **extra}
    return targets


def third_target(folder: Path) -> dict[str, Any]:
    """One more target, of three rows, as one column."""
    draw = random.Random("third")
    path = folder / "third.jsonl"
    lines = [{"id": f"third{i}", "messages": conversation(draw)} for i in range(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"path": str(path), "per": "group"}


def tiny_config(setup: Setup, run: Path | str, **changes: Any) -> Config:
    """A config for CPU replicas; `changes` override: `gradients__side=4` sets gradients.side."""
    data: dict[str, Any] = {
        "run": str(run),
        "model": {"name": str(setup.model)},
        "data": {"candidates": setup.candidates, "max_length": 128},
        "targets": setup.targets,
        "embedding": {"blocks": 2},
        "gradients": {"side": 8, "dim": 64},
        "landmarks": {"count": 24, "choose": "uniform"},
        "selection": {"budget": 10},
        "replicas": {
            "num_gpus": 0,
            "num_cpus": 1,
            "max": 1,
            "rows_per_shard": 16,
            "gradient_rows_per_shard": 8,
        },
    }
    data = json.loads(json.dumps(data))  # so that no change reaches the shared setup
    for key, value in changes.items():
        *sections, last = key.split("__")
        node = data
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return parse_config(data)


def write_config(path: Path, config: Config) -> str:
    """Write a config as YAML; returns the path."""
    path.write_text(dump_config(config))
    return str(path)


def scores_of(run: str) -> pa.Table:
    """All parts of RUN/scores, in order."""
    parts = sorted(info.url for info in storage.list_objects(storage.join(run, "scores")))
    tables = [pq.read_table(pa.BufferReader(storage.read_bytes(url))) for url in parts]
    return pa.concat_tables(tables)


def selection_of(run: str) -> list[dict[str, Any]]:
    """The rows of RUN/selection.jsonl."""
    text = storage.read_bytes(storage.join(run, "selection.jsonl")).decode()
    return [json.loads(line) for line in text.splitlines()]


def results_of(run: str) -> dict[str, bytes]:
    """The bytes of everything that must be the same however a run was executed."""
    names = ["selection.jsonl", "fidelity.json"]
    for folder in ("scores", "selection"):
        listed = storage.list_objects(storage.join(run, folder))
        names += sorted(f"{folder}/{info.url.rsplit('/', 1)[-1]}" for info in listed)
    return {name: storage.read_bytes(storage.join(run, name)) for name in names}


def assert_same_results(first: str, second: str, why: str) -> None:
    """Both runs wrote the same bytes; `why` names the likely bug where they did not."""
    one, two = results_of(first), results_of(second)
    assert one.keys() == two.keys(), f"{why}: the runs wrote different files"
    for name in one:
        assert one[name] == two[name], f"{why}: {name} differs between {first} and {second}"


def manifest_of(run: str) -> Manifest:
    """The run's manifest."""
    manifest = read_manifest(run)
    assert manifest is not None, f"{run} has no manifest.json"
    return manifest


def shards_in(cache: Path | str) -> set[str]:
    """Keys of the shards in a local cache."""
    return {str(path.relative_to(cache)) for path in Path(cache).glob("*/*/*.parquet")}


def score_column(run_directory: str, name: str) -> np.ndarray:
    """A column of the scores, null as NaN."""
    return scores_of(run_directory).column(name).to_numpy(zero_copy_only=False)


def messages_of(row: dict[str, Any]) -> list[dict[str, str]]:
    """The turns of a row of the tiny pool."""
    if row.get("messages"):
        return row["messages"]
    pair = (("user", row["prompt"]), ("assistant", row["completion"]))
    return [{"role": role, "content": content} for role, content in pair]
