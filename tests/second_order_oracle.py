"""The robust objective of a tiny run, dense, from autograd one row at a time in float64."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import clarabel
import numpy as np
import pyarrow.parquet as pq
import scipy.sparse as sp
import torch
from optimizer_training import Trained
from test_scores_of_runs import tokens_and_labels
from tiny_models import wide_norms
from tiny_run import Setup, messages_of
from transformers import AutoModelForCausalLM, AutoTokenizer


class Dense:
    """Gradients of a pool's rows and of the targets', and what is made of them.

    shares: each target row's part of the mean loss, where `mean` is over targets, then groups.
    """

    def __init__(self, setup: Setup, ids: Sequence[str], trained: Trained | None = None) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(setup.model)
        if trained is None:
            model: Any = AutoModelForCausalLM.from_pretrained(
                setup.model, dtype=torch.float64, attn_implementation="eager"
            )
            wanted = "_proj"
        else:
            model, wanted = trained.model, "lora_"
            model.set_attn_implementation("eager")  # fused attention has no second derivative
        self.model = wide_norms(model.eval())
        named = self.model.named_parameters()
        self.weights = {name: w.requires_grad_(True) for name, w in named if wanted in name}
        pool = setup.folder / "pool"
        rows = {f"a{i:02d}": r for i, r in enumerate(pq.read_table(pool / "a.parquet").to_pylist())}
        for i, line in enumerate((pool / "b.jsonl").read_text().splitlines()):
            if f"b.jsonl:{i}" in ids:
                rows[f"b.jsonl:{i}"] = json.loads(line)
        self.rows = [rows[each] for each in ids]
        self.targets: list[dict[str, Any]] = []
        shares: list[float] = []
        for each in setup.targets.values():
            lines = [json.loads(x) for x in Path(each["path"]).read_text().splitlines()]
            groups = [
                x.get(each["group_by"]) if "group_by" in each else i for i, x in enumerate(lines)
            ]
            for line, group in zip(lines, groups, strict=True):
                shares.append(1 / (len(setup.targets) * len(set(groups)) * groups.count(group)))
                self.targets.append(line)
        self.shares = np.asarray(shares)
        a, self.b = np.ones(1), np.zeros(sum(w.numel() for w in self.weights.values()))
        if trained is not None:
            a, self.b = (
                torch.cat([of[name].flatten() for name in self.weights]).numpy()
                for of in (trained.scale, trained.offset)
            )
        self.A = np.stack([a * self.gradient(row) for row in self.rows])
        self.G = np.stack([self.gradient(row) for row in self.targets])

    def loss(self, row: dict[str, Any]) -> torch.Tensor:
        ids, labels = tokens_and_labels(messages_of(row), self.tokenizer)
        return self.model(input_ids=ids, labels=labels).loss

    def gradient(self, row: dict[str, Any]) -> np.ndarray:
        found = torch.autograd.grad(self.loss(row), list(self.weights.values()))
        return torch.cat([g.flatten() for g in found]).numpy()

    def fisher(self, directions: np.ndarray) -> np.ndarray:
        """V H V' with H the weighted sum of T_t d_t d_t', d_t = g_t - mean (one after the other).

        The factor is what such a sum has in the mean where g_t has the covariance 1 / T_t: of the
        m x m matrix that takes gradients to their deviations, entry by entry.
        """
        mean = self.shares @ self.G
        tokens = []
        for row in self.targets:
            _, labels = tokens_and_labels(messages_of(row), self.tokenizer)
            tokens.append(int((labels[0, 1:] != -100).sum()))
        total, kept = np.zeros((len(directions), len(directions))), 0.0
        for t, (share, g) in enumerate(zip(self.shares, self.G, strict=True)):
            along = directions @ (g - mean)
            total += share * tokens[t] * np.outer(along, along)
            for s, other in enumerate(self.shares):
                kept += share * tokens[t] * (float(s == t) - other) ** 2 / tokens[s]
        return total / kept

    def hessian(self, directions: np.ndarray) -> np.ndarray:
        """H V' (r x D) of the weighted mean loss, row by row."""
        sizes = [w.numel() for w in self.weights.values()]
        along = [
            [part.view_as(w) for part, w in zip(v.split(sizes), self.weights.values(), strict=True)]
            for v in torch.from_numpy(directions)
        ]
        total = np.zeros_like(directions)
        for row, share in zip(self.targets, self.shares, strict=True):
            weights = list(self.weights.values())
            gradients = torch.autograd.grad(self.loss(row), weights, create_graph=True)
            for k, parts in enumerate(along):
                dot = sum((g * v).sum() for g, v in zip(gradients, parts, strict=True))
                product = torch.autograd.grad(dot, weights, retain_graph=True)
                total[k] += share * torch.cat([each.flatten() for each in product]).numpy()
        return total

    @property
    def p(self) -> np.ndarray:
        return self.A @ (self.shares @ self.G)


def solved(c: np.ndarray, Q: np.ndarray, eta: float, lam: float) -> np.ndarray:
    """The weights by clarabel for a dense Q."""
    n = len(c)
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    for name in ("tol_gap_abs", "tol_gap_rel", "tol_feas"):
        setattr(settings, name, 1e-12)
    quadratic = sp.triu(sp.csc_matrix(eta * Q + lam * np.eye(n)), format="csc")
    rows = sp.vstack([sp.csc_matrix(np.ones((1, n))), -sp.eye(n)], format="csc")
    right = np.concatenate([[float(n)], np.zeros(n)])
    cones = [clarabel.ZeroConeT(1), clarabel.NonnegativeConeT(n)]
    return np.array(clarabel.DefaultSolver(quadratic, -c, rows, right, cones, settings).solve().x)
