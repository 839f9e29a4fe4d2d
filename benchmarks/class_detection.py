"""DataInf's class-detection benchmark: AUC and recall by method, and the speed of the influences.

Trains the reference model (`influence finetune`), runs `influence evaluate`, and computes the same
influences in the loops of the paper's own code. What is done is not done again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import summary, write_json
from influence.cache import Cache
from influence.candidates import scan_files
from influence.config import Config
from influence.config_loading import parse_config, read_yaml
from influence.datainf import LayerBlock, datainf, influences
from influence.evaluations import EVALUATIONS
from influence.finetune_job import run_finetune
from influence.gradient_rows import gradient_rows, layer_blocks
from influence.one_process import run_evaluate
from influence.run_log import read_manifest

CONFIG = Path(__file__).with_name("class_detection.yaml")
Layers = dict[str, Tensor]


def main() -> None:
    """Train, evaluate, time, write."""
    arguments = _arguments()
    config = _config(arguments)
    record = None if arguments.no_training else run_finetune(config)
    seconds, found = [], {}
    for _ in range(arguments.repeats):
        found = run_evaluate(config)["class_detection"]
        if found["about"]["influence_seconds"] is not None:
            seconds.append(found["about"]["influence_seconds"])
    document: dict[str, Any] = {
        "settings": _settings(config, str(arguments.data)),
        "class_detection": found,
        "influence_seconds": seconds,
    }
    if record is not None:
        document["training"] = {
            "seconds": record.seconds,
            "steps": record.total_steps,
            "tokens": record.tokens,
            "losses": _epoch_losses(record),
        }
    write_json(arguments.json, document)
    if arguments.loops:
        torch.set_num_threads(config.replicas.num_cpus)
        document["loops"] = time_loops(config, arguments.loops, arguments.whole_rows)
        ours = summary(seconds)["median"]
        for each in document["loops"].values():
            each["times_ours"] = each["seconds_all_targets"] / ours
        write_json(arguments.json, document)
    print(arguments.json)


def time_loops(config: Config, count: int, whole_rows: int) -> dict[str, Any]:
    """The paper's loops on the stored gradients for some targets, and on whole gradients' sizes.

    Both are linear in targets and rows, and are scaled up to all of them.
    """
    rows, targets, blocks = stored_gradients(config)
    by_row = [_by_layer(row, blocks) for row in rows]
    start = time.perf_counter()
    found = [paper_influences(by_row, _by_layer(target, blocks)) for target in targets[:count]]
    each = (time.perf_counter() - start) / count
    norms = np.stack([np.linalg.norm(rows[:, b.span].numpy(), axis=1) for b in blocks], axis=1)
    # Of projected layers the loops know no other size and norm than the projection's.
    own = [LayerBlock(b.name, b.offset, b.length, b.length) for b in blocks]
    products = datainf(lambda: [(rows, torch.from_numpy(norms))], targets[:count], own)
    expected = influences(rows, products).double().numpy()
    error = np.abs(np.stack(found, axis=1) - expected).max() / np.abs(expected).max()
    made = {
        "stored": {
            "numbers_a_row": rows.shape[1],
            "rows": len(rows),
            "targets_timed": count,
            "seconds_a_target": each,
            "seconds_all_targets": each * len(targets),
            "largest_difference": float(error),
        }
    }
    del by_row
    generator = torch.Generator().manual_seed(0)
    sizes = [LayerBlock(b.name, 0, b.size, b.size) for b in blocks]
    whole = [
        {b.name: torch.randn(b.size, generator=generator) for b in sizes} for _ in range(whole_rows)
    ]
    start = time.perf_counter()
    paper_influences(whole, whole[0])
    taken = time.perf_counter() - start
    made["whole"] = {
        "numbers_a_row": sum(b.size for b in blocks),
        "rows": whole_rows,
        "targets_timed": 1,
        "seconds_a_target": taken * len(rows) / whole_rows,
        "seconds_all_targets": taken * len(rows) / whole_rows * len(targets),
    }
    return made


def paper_influences(rows: Sequence[Layers], target: Layers) -> np.ndarray:
    """DataInf as in the code of its authors: sample by sample and layer by layer."""
    products = {}
    for name, v in target.items():
        squares = torch.zeros(len(rows))
        for k, row in enumerate(rows):
            squares[k] = torch.mean(row[name] ** 2)
        damping = torch.mean(squares) / 10
        total = torch.zeros(v.shape)
        for row in rows:
            g = row[name]
            along = torch.sum(v * g) / (damping + torch.sum(g**2))
            total += (v - along * g) / (len(rows) * damping)
        products[name] = total
    found = np.zeros(len(rows))
    for k, row in enumerate(rows):
        value: Any = 0
        for name, product in products.items():
            value += torch.sum(product * row[name])
        found[k] = -float(value)
    return found


def stored_gradients(config: Config) -> tuple[Tensor, Tensor, list[LayerBlock]]:
    """(rows x d, targets x d, layers) of the evaluation, from the cache."""
    own = EVALUATIONS["class_detection"].settings(config)
    manifest = read_manifest(own.run)
    if manifest is None:
        raise RuntimeError(f"{own.run}: no manifest.json; the evaluation comes first")
    (target,) = scan_files([config.targets["math"].path])
    rows, targets, blocks = [], [], []
    for key in manifest.stages["gradients"].planned:
        shard = Cache(config.cache_url).read(key)
        some = gradient_rows(shard, unit=False)
        if some is None:
            continue
        blocks = layer_blocks(shard.layout)
        (targets if target.content_hash in key else rows).append(some.vectors)
    return (
        torch.from_numpy(np.concatenate(rows)),
        torch.from_numpy(np.concatenate(targets)),
        blocks,
    )


def _by_layer(row: Tensor, blocks: Sequence[LayerBlock]) -> Layers:
    return {b.name: row[b.span].clone() for b in blocks}


def _epoch_losses(record: Any) -> list[float]:
    """Mean loss of the steps of each epoch."""
    losses = [step.loss for step in record.steps]
    per = record.epoch_steps
    return [float(np.mean(losses[i : i + per])) for i in range(0, len(losses), per)]


def _settings(config: Config, folder: str) -> dict[str, Any]:
    """What was run, without where."""
    text = json.dumps(config.model_dump(mode="json", exclude_unset=True))
    return json.loads(text.replace(folder, "INFLUENCE_DATA"))


def _config(arguments: argparse.Namespace) -> Config:
    data: Any = read_yaml(str(CONFIG))
    folder = str(arguments.data)
    data["data"]["candidates"] = [
        path.replace("INFLUENCE_DATA", folder) for path in data["data"]["candidates"]
    ]
    for target in data["targets"].values():
        target["path"] = target["path"].replace("INFLUENCE_DATA", folder)
    return parse_config(data, arguments.set, name=str(CONFIG))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds datainf/")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE, as in influence")
    parser.add_argument("--repeats", type=int, default=3, help="timings of the influence step")
    parser.add_argument("--loops", type=int, default=2, help="targets in loops; 0: none")
    parser.add_argument("--whole-rows", type=int, default=45, help="rows of the second loop")
    parser.add_argument("--no-training", action="store_true", help="the adapter is there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
