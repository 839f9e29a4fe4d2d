"""The stages that make shards: one small function each, in a registry, with one signature.

A stage turns the batches of one unit into columns: a vector, a norm and a loss for every encoded
row. What it needs of the config arrives as plain values in `StageSettings`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence.batching import Batch
from influence.embedding_kind import EmbeddingKind
from influence.embeddings import make_embedder
from influence.gradients import (
    attributed_layers,
    make_engine,
    mean_gradient,
    settled_layers,
)
from influence.memory import TokenLimit, computed, restarted
from influence.optimizer_state import load_adam_state
from influence.optimizer_step import OptimizerStep, load_step
from influence.optimizer_use import TARGET_GRADIENTS
from influence.projection import layer_shapes, make_layerwise, make_projection
from influence.replica import Replica
from influence.stage_settings import StageSettings
from influence.update_engine import make_update_engine

VECTOR_STAGES = ("gradients", TARGET_GRADIENTS)
"""The stages that make vectors of gradients: of candidates, and of targets where they differ."""


@dataclass
class Vectors:
    """What a stage makes of a unit: one row per scorable row, in the order of `positions`.

    Attributes:
        positions: index into the unit's encoded rows.
        vectors: (n x dim).
        norm: (n,) norm of the embedding, of the whole gradient, or of its projection.
        loss: (n,) reduced loss in nats; NaN where the stage computes none.
        blocks: the layers of a gradient whose vector keeps them apart (name, offset, length).
        sizes: numbers of each of those layers before it was projected.
        norms: (n x layers) exact norms of them, or None.
    """

    positions: np.ndarray
    vectors: np.ndarray
    norm: np.ndarray
    loss: np.ndarray
    blocks: list[tuple[str, int, int]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    norms: np.ndarray | None = None


class Toolbox:
    """A loaded replica and the embedder and engines built on it, each once."""

    def __init__(self, replica: Replica, settings: StageSettings) -> None:
        self.replica = replica
        self.settings = settings
        self._built: dict[str, Any] = {}
        self.limit = TokenLimit()
        self.notes: list[str] = []
        self._products: tuple[tuple[tuple[str, ...], ...], Any] | None = None
        self._embedder: tuple[dict[str, Any], Any] | None = None

    def _once(self, name: str, build: Callable[[], Any]) -> Any:
        if name not in self._built:
            self._built[name] = build()
        return self._built[name]

    @property
    def layers(self) -> list[Any]:
        """The attributed layers, their rules tried against autograd."""

        def build() -> list[Any]:
            chosen = attributed_layers(
                self.replica.model,
                self.settings.parameters,
                blocks=self.settings.parameter_blocks,
                seed=self.settings.seed,
                only=self.settings.layers,
            )
            settled, notes = settled_layers(self.replica.model, chosen)
            self.notes += notes
            return settled

        return self._once("layers", build)

    def embedder(self, asked: tuple[str, int, int, str, int] | None = None) -> Any:
        """The embedder of the config, or of the settings that a unit names.

        Only the last one is kept: dense tangents are as large as the blocks.
        """
        settings = dict(self.settings.embedding)
        if asked is not None:
            settings |= EmbeddingKind(*asked)._asdict()
        if self._embedder is None or self._embedder[0] != settings:
            self._embedder = None
            self._embedder = (settings, make_embedder(self.replica.model, **settings))
        return self._embedder[1]

    @property
    def step(self) -> OptimizerStep:
        """The optimiser's next step, without b, which the first order does not ask for."""
        kind, state = self.settings.optimizer, self.settings.optimizer_state
        return self._once(
            "step",
            lambda: load_step(kind, state, self.replica.model, self.layers, with_offset=False),
        )

    def scale(self, stage: str) -> dict[str, Tensor] | None:
        """What a stage's gradients are multiplied with, by layer; None: nothing."""
        return self.step.scale if stage in self.settings.scaled else None

    @property
    def offset(self) -> dict[str, Tensor]:
        """b of the optimiser's next step, by layer; zeros where it has none."""
        kind, state = self.settings.optimizer, self.settings.optimizer_state

        def build() -> dict[str, Tensor]:
            found = load_step(kind, state, self.replica.model, self.layers).offset
            if found is not None:
                return found
            shapes = {each.name: (each.out_features, each.in_features) for each in self.layers}
            return {n: torch.zeros(s, device=self.replica.device) for n, s in shapes.items()}

        return self._once("offset", build)

    def share(self, other: Toolbox) -> None:
        """Take over another's layers, which it settles now at the latest, projection and limits."""
        self.limit, self.notes = other.limit, other.notes
        self._built["layers"] = other.layers
        if self.settings.projection != "none":
            self._built["projection"] = other.projection

    def step_notes(self, stage: str) -> tuple[str, ...]:
        """What is to be said of the step that a stage's gradients are scaled by; nothing before
        the first row: a shard may have none that can be scored."""
        if self.settings.updates and stage == "gradients":
            built = self._built.get("updates")
            return () if built is None else (f"update: {built[1]}",)
        return (f"optimizer: {self.step.note}",) if stage in self.settings.scaled else ()

    @property
    def projection(self) -> Any:
        """The projection of all layers' gradients, the same for candidates and targets."""
        settings = self.settings
        dtype = torch.float64 if self.replica.dtype == torch.float64 else torch.float32
        where: dict[str, Any] = {"dtype": dtype, "device": self.replica.device}

        def build() -> Any:
            if settings.projection == "layerwise":
                return make_layerwise(
                    layer_shapes(self.layers),
                    sketch=settings.layer_sketch,
                    layer_dim=settings.layer_dim,
                    seed=settings.seed,
                    **where,
                )
            return make_projection(
                settings.projection,
                layer_shapes(self.layers),
                side=settings.side,
                dim=settings.dim,
                seed=settings.seed,
                **where,
            )

        return self._once("projection", build)

    def vector_engine(self, stage: str = "gradients") -> Any:
        """Per-sample gradients, projected or (`projection: none`) whole."""
        settings, scale = self.settings, self.scale(stage)
        if settings.updates and stage == "gradients":
            return self._once("updates", self._updates)[0]

        def build() -> Any:
            model, layers, reduction = self.replica.model, self.layers, settings.reduction
            if settings.projection == "none":
                return make_engine(
                    model, layers, reduction=reduction, scale=scale, full=True, layer_norms=True
                )
            by_layer = settings.projection == "layerwise"
            return make_engine(
                model,
                layers,
                reduction=reduction,
                projection=self.projection,
                scale=scale,
                exact_norms=settings.exact_norms or by_layer,
                layer_norms=by_layer,
            )

        return self._once("vectors" if scale is None else "scaled vectors", build)

    def _updates(self) -> tuple[Any, str]:
        """AdamW's updates by every sample's gradient, in place of these gradients, and a note."""
        settings, model = self.settings, self.replica.model
        state = load_adam_state(settings.optimizer_state or "", model)
        kept = None if settings.projection == "none" else self.projection
        engine = make_update_engine(model, self.layers, state, settings.reduction, kept)
        return engine, state.note

    def set_up(self, stage: str, embedding: tuple[str, int, int, str, int] | None = None) -> None:
        """Build what a stage needs, unless it is there: no work on rows, and timed apart."""
        if stage == "embedding":
            assert self.embedder(embedding) is not None
        elif stage in VECTOR_STAGES:
            self.vector_engine(stage)
        else:
            self.scale(stage)
            assert self.layers

    def product_engine(
        self, keys: tuple[tuple[str, ...], ...], read: Callable[[], dict[str, list[Tensor]]]
    ) -> Any:
        """Exact inner products with target gradients {layer: (m, out, in) for each target}.

        `keys` names each target's; the engine of the last keys is kept, and an earlier one is
        dropped first: full target gradients are the largest thing that a replica holds.
        """
        if self._products is None or self._products[0] != keys:
            self._products = None
            engine = make_engine(
                self.replica.model,
                self.layers,
                reduction=self.settings.reduction,
                targets=read(),
                scale=self.scale("inner_products"),
            )
            self._products = (keys, engine)
        return self._products[1]


def embed(
    tools: Toolbox,
    batches: Sequence[Batch],
    embedding: tuple[str, int, int, str, int] | None = None,
) -> Vectors:
    """A cheap embedding of every row: unit rows in float16, their norms beside them."""
    rows, positions = [], []
    embedder = tools.embedder(embedding)

    def compute(batch: Batch) -> np.ndarray:
        moved = batch.to(tools.replica.device)
        with torch.no_grad():
            return embedder.embed(moved.input_ids, moved.lengths).double().cpu().numpy()

    for batch, found in computed(batches, tools.limit, compute):
        rows.append(found)
        positions += batch.positions
    raw = np.concatenate(rows)
    norm = np.linalg.norm(raw, axis=1)
    unit = (raw / np.maximum(norm, np.finfo(np.float64).tiny)[:, None]).astype(np.float16)
    return Vectors(np.asarray(positions), unit, norm, np.full(len(norm), np.nan))


def gradient_vectors(tools: Toolbox, batches: Sequence[Batch], stage: str = "gradients") -> Vectors:
    """Projected or whole per-sample gradients (unnormalised), their norms and losses.

    Where the optimiser scales the stage, the gradients are a * g_i, and so are the norms.
    """
    found = _gradients(tools.vector_engine(stage), tools, batches, "vectors")
    if found.norms is not None:
        found.sizes = [layer.size for layer in tools.layers]
        lengths = found.sizes
        if tools.settings.projection == "layerwise":
            lengths = [min(size, tools.settings.layer_dim) for size in found.sizes]
        ends = np.cumsum(lengths).tolist()
        found.blocks = [
            (layer.name, end - length, length)
            for layer, length, end in zip(tools.layers, lengths, ends, strict=True)
        ]
    return found


def inner_products(tools: Toolbox, batches: Sequence[Batch], engine: Any) -> Vectors:
    """Exact inner products with the target vectors, exact norms and losses."""
    return _gradients(engine, tools, batches, "products")


def split_columns(whole: Vectors, widths: Sequence[int]) -> list[Vectors]:
    """Cut the vectors' columns into parts of these widths; norms and losses go to each."""
    cuts = np.cumsum(widths)[:-1]
    return [
        Vectors(whole.positions, part, whole.norm, whole.loss)
        for part in np.split(whole.vectors, cuts, axis=1)
    ]


def target_vector(
    tools: Toolbox, batches: Sequence[Batch], names: Sequence[str]
) -> tuple[dict[str, Tensor], int]:
    """Mean over the rows of the (unit) gradients: {layer: (out, in)}, and the number of rows.

    Where the optimiser scales the stage, it is multiplied with a, and of unnormalised gradients.
    `names` are those of the rows that the batches' positions index. Raises InputError for a row
    without a usable gradient.
    """

    def compute(parts: Sequence[Batch], moved: Iterable[Batch]) -> tuple[dict[str, Tensor], int]:
        return mean_gradient(
            tools.replica.model,
            tools.layers,
            moved,
            reduction=tools.settings.reduction,
            normalize=tools.settings.normalize,
            names=[[names[position] for position in batch.positions] for batch in parts],
        )

    total, count = restarted(batches, tools.limit, tools.replica.device, compute)
    for name, a in (tools.scale("target_vectors") or {}).items():
        total[name] *= a
    return {name: value / count for name, value in total.items()}, count


def _gradients(engine: Any, tools: Toolbox, batches: Sequence[Batch], column: str) -> Vectors:
    vectors, norms, losses, positions = [], [], [], []
    layers: list[np.ndarray] = []
    device = tools.replica.device
    for batch, gradients in computed(batches, tools.limit, lambda b: engine(b.to(device))):
        vectors.append(getattr(gradients, column).float().cpu().numpy())
        norms.append(gradients.norm.double().cpu().numpy())
        losses.append(gradients.loss.double().cpu().numpy())
        if gradients.layer_norms is not None:
            layers.append(gradients.layer_norms.float().cpu().numpy())
        positions += batch.positions
    return Vectors(
        np.asarray(positions),
        np.concatenate(vectors),
        np.concatenate(norms),
        np.concatenate(losses),
        norms=np.concatenate(layers) if layers else None,
    )
