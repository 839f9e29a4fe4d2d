"""What the rest of the package knows of a method: what it does, and what is true of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a method's traits are asked for by what these modules are made of
    from influence.config import Config
    from influence.job import Job
    from influence.model_shape import ModelShape
    from influence.planned_work import Planner
    from influence.row_scores import Score
    from influence.row_stages import RowStage


@dataclass(frozen=True)
class Method:
    """One way of scoring the candidates. What it is not said to be, it is not.

    Attributes:
        title: what reports call it.
        run: (job, reducer) -> None: from the catalogue to the reducer's scores. On a cluster the
            reducer is an actor's stand-in, with the methods of `influence.reducer.Reducer`.
        plan: adds to a planner the stages that `run` will go through.
        runs_model: the language model is loaded; else its tokenizer alone.
        needs_gradients: gradients are taken, so parameters have to be attributed to layers.
        embeds: the stage `embedding` is made of every candidate.
        embeds_targets: and of the targets' rows.
        embedding_kind: the kind of embedding, where the method and not the config decides it.
        draws_landmarks: gradients are taken of chosen candidates, and the others' are predicted.
        steps: scores are about an optimiser's step: its state, a warm-up and the second order make
            sense.
        solves_weights: the selection's weights are those of the robust objective; else equal.
        signed: scores are influences whose sign means something: rows below zero do harm, and are
            not selected.
        reference_model: gradients are taken with a fine-tuned reference model (`reference`).
        at_checkpoints: gradients are taken at the epochs' checkpoints of a warm-up.
        score: the function behind `reducer.score_rows`, for a method that runs it.
        no_score: why a row has no score where `score` gives none.
        stages: those of its own, computed by the replicas.
        gradient_defaults: values of the section `gradients` where none are given.
        section_defaults: the same of other sections; one that is null by default is there then.
        target_defaults: the same of every target.
        check: what is wrong with a config, or None, in place of the rules for any other method.
        check_files: sees that what it reads beside model and data is there; raises `InputError`.
        check_bytes: (config, shape, target columns): refuses what would not fit; `InputError`.
    """

    title: str
    run: Callable[[Job, Any], None]
    plan: Callable[[Planner], None]
    runs_model: bool = True
    needs_gradients: bool = False
    embeds: bool = False
    embeds_targets: bool = False
    embedding_kind: str | None = None
    draws_landmarks: bool = False
    steps: bool = False
    solves_weights: bool = False
    signed: bool = False
    reference_model: bool = False
    at_checkpoints: bool = False
    score: Score | None = None
    no_score: str = "score is not finite"
    stages: tuple[RowStage, ...] = ()
    gradient_defaults: Mapping[str, object] = field(default_factory=dict)
    section_defaults: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    target_defaults: Mapping[str, object] = field(default_factory=dict)
    check: Callable[[Config], str | None] | None = None
    check_files: Callable[[Config], object] | None = None
    check_bytes: Callable[[Config, ModelShape, int], None] | None = None

    @property
    def vectors(self) -> tuple[str, ...]:
        """The stages that leave a vector for each row in the cache."""
        return ("embedding",) * self.embeds + ("gradients",) * self.needs_gradients
