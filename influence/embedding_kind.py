"""An embedding by its settings, as configs, units of work and replicas name it."""

from __future__ import annotations

from typing import Any, NamedTuple

from influence.config import Config
from influence.config_embedding import NamedEmbedding
from influence.fingerprints import Fingerprint, embedding_values, values_that_count
from influence.fingerprints import fingerprint as digest_of

DIM = 4096
"""The default `dim`, which labels leave out."""
NARROW = 256


class EmbeddingKind(NamedTuple):
    """The settings of one embedding; its seed is the run's."""

    kind: str
    blocks: int
    tangents: int
    tangent: str
    dim: int

    @property
    def label(self) -> str:
        """A short name, the same for all embeddings of equal numbers, and of no others."""
        parts = [self.kind]
        if self.kind != "rds":
            parts.append(f"{self.blocks} block{'s' if self.blocks > 1 else ''}")
        if self.kind == "jvp":
            parts.append(
                f"{self.tangents} {self.tangent} tangent{'s' if self.tangents > 1 else ''}"
            )
        if self.dim != DIM:
            parts.append(f"dim {self.dim}")
        return ", ".join(parts)

    def width(self, hidden: int) -> int:
        """Numbers of a row in a model with so many hidden features."""
        return min(self.dim, hidden * (self.tangents if self.kind == "jvp" else 1))


def kind_of(section: NamedEmbedding) -> EmbeddingKind:
    """Of a section of the config."""
    return EmbeddingKind(
        section.kind, section.blocks, section.tangents, section.tangent, section.dim
    )


def named(config: Config, kind: EmbeddingKind) -> Config:
    """The config with this embedding in place of its own; `pilot` and `choices` stay."""
    embedding = config.embedding.model_copy(update=kind._asdict())
    return config.model_copy(update={"embedding": embedding})


def distinct(kinds: list[EmbeddingKind]) -> list[EmbeddingKind]:
    """The kinds in their order, those of equal numbers once."""
    seen: dict[tuple[Any, ...], EmbeddingKind] = {}
    for kind in kinds:
        read: tuple[Any, ...] = (kind.kind, kind.dim)
        if kind.kind != "rds":
            read += (kind.blocks,)
        if kind.kind == "jvp":
            read += (kind.tangents, kind.tangent)
        seen.setdefault(read, kind)
    return list(seen.values())


def default_kinds(blocks: int) -> list[EmbeddingKind]:
    """Cheap ones first: hidden states and cheap tangents of 2 and 4 blocks, and all of the model.

    blocks: the model's; a smaller model has fewer of them.
    """
    shallow = [
        EmbeddingKind(kind, min(depth, blocks), 2, "rank1", DIM)
        for depth in (2, 4)
        for kind in ("hidden", "jvp")
    ]
    return distinct([*shallow, EmbeddingKind("rds", min(4, blocks), 2, "rank1", DIM)])


def variants(own: EmbeddingKind, hidden: int) -> list[EmbeddingKind]:
    """It with one thing changed that its kind reads: the tangents' number, their kind, the width.

    hidden: features of the model.
    """
    found = []
    if own.kind == "jvp":
        found.append(own._replace(tangents=2 if own.tangents == 1 else 1))
        found.append(own._replace(tangent="dense" if own.tangent == "rank1" else "rank1"))
    if own.width(hidden) > NARROW:
        found.append(own._replace(dim=NARROW))
    return found


def embedding_fingerprint(whole: Fingerprint, config: Config, kind: EmbeddingKind) -> Fingerprint:
    """Of another embedding of the same rows by the same model: as if the config had named it.

    whole: of any embedding of that model.
    """
    given = embedding_values(config)
    every = {"embedding", "dim", "seed", "blocks", "tangents", "tangent", *given}
    rest = {name: value for name, value in whole.values.items() if name not in every}
    return digest_of({**rest, **values_that_count(named(config, kind))})
