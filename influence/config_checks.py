"""Values of a config that are right by themselves and do not go together."""

from __future__ import annotations

from influence.budget import parse_budget
from influence.config import Config
from influence.config_finetune import POOL, FinetuneConfig
from influence.config_weights import WeightsConfig
from influence.errors import InputError
from influence.methods import METHODS, those_that

LAYERED = ("layerwise", "none")
"""Projections that keep layers apart, which DataInf's curvature needs."""


def check_together(config: Config, name: str = "config") -> None:
    """Raise `InputError`, naming the keys, for the first values that do not go together."""
    of_method = METHODS[config.method].check or of_others
    of_order = _of_second_order if config.weights.order == 2 else _of_first_order
    together = _of_optimizer(config) or _of_warmup(config)
    problem = together or of_method(config) or of_order(config)
    if problem is not None:
        raise InputError(f"{name}: {problem}")


def _of_warmup(config: Config) -> str | None:
    if config.warmup is None:
        return None
    method = METHODS[config.method]
    if not (method.steps or method.at_checkpoints):
        instead = ""
        if METHODS[config.method].reference_model:
            instead = "; its reference model is fine-tuned by reference.finetune"
        able = ", ".join((*those_that("at_checkpoints"), " and ".join(those_that("steps"))))
        return (
            f"warmup: it is for method: {able}; with method: {config.method} "
            f"expected null (or warmup.fraction: 0){instead}"
        )
    return _of_own_training("warmup", config.warmup)


def _of_optimizer(config: Config) -> str | None:
    kind, state, method = config.optimizer.kind, config.optimizer.state, config.method
    if not METHODS[method].steps and (kind != "sgd" or state is not None):
        asked = f"kind: {kind}" if kind != "sgd" else f"state: {state!r}"
        return (
            f"optimizer.{asked} is for method {' or '.join(those_that('steps'))}, whose scores are "
            f"about an optimiser's step; with method: {method} leave the section out"
        )
    if kind != "sgd" and state is None and config.warmup is None:
        return (
            f"optimizer.state: null, and optimizer.kind: {kind} divides gradients by its moments; "
            "expected a checkpoint with an optimizer.pt (of the Trainer, or the output of "
            "`influence finetune`), or a warm-up that makes one: `warmup: {}`"
        )
    return None


def check_in2core(config: Config) -> str | None:
    """What is wrong with a config of method in2core, or None."""
    gradients = config.gradients
    if gradients.projection not in LAYERED:
        return (
            f"gradients.projection: {gradients.projection!r} adds layers up, and method: in2core "
            f"has a curvature for each; expected one of {', '.join(LAYERED)}"
        )
    if gradients.reduction == "token_max" and gradients.projection != "none":
        return (
            "gradients.reduction: token_max multiplies every token's gradient with the whole "
            f"directions; expected gradients.projection: none, found {gradients.projection!r}"
        )
    if gradients.reduction == "token_max" and gradients.normalize:
        return (
            "gradients.normalize: the largest of a row's tokens is no product with its unit "
            "gradient; expected false with gradients.reduction: token_max"
        )
    if config.layer_patterns == ():
        return "layers: [] names none; expected all, auto, or patterns of parameter names"
    own = (
        ("reference.finetune", config.reference.finetune),
        ("transfer.finetune", config.transfer.finetune),
    )
    for key, section in own:
        if section is not None and (problem := _of_own_training(key, section)):
            return problem
    if config.transfer.finetune is not None and config.transfer.model is None:
        return "transfer.finetune: expected transfer.model beside it, the model to fine-tune"
    if config.reference.finetune is not None and config.reference.adapter is not None:
        return (
            f"reference.adapter: {config.reference.adapter!r} is there, and reference.finetune "
            "makes one; expected one of them"
        )
    if config.reference.finetune is not None:
        return None
    adapters = config.model.adapter, config.reference.adapter
    if None not in adapters and adapters[0] != adapters[1]:
        return (
            f"reference.adapter: {adapters[1]!r} and model.adapter: {adapters[0]!r}; expected one "
            "of them, the adapter of the reference model"
        )
    return None


def _of_own_training(key: str, section: FinetuneConfig) -> str | None:
    """The job knows what to train on and where to: the rest is for `influence finetune`."""
    if section.data not in (None, [POOL]):
        return (
            f"{key}.data: {section.data!r}; expected `pool` (with `fraction` for a "
            "random part of it); for other data make the adapter with `influence finetune` and "
            "name it"
        )
    for name in ("evaluate", "evaluate_every", "output"):
        if getattr(section, name):
            return (
                f"{key}.{name}: {getattr(section, name)!r}; expected null: the "
                "adapter lies in the cache for all runs, and is not evaluated on the way; "
                "`influence finetune` with finetune.data: pool does that"
            )
    return None


def of_others(config: Config) -> str | None:
    """What is wrong with a config of a method that has no rules of its own, or None."""
    method = config.method
    if config.gradients.reduction == "token_max":
        return (
            "gradients.reduction: token_max is for method: in2core; with method: "
            f"{method} expected mean, sum or sqrt"
        )
    if config.layers != "all":
        return (
            f"layers: {config.layers!r} is for method: in2core; with method: {method} choose "
            "parameters by name in gradients.parameters"
        )
    if parse_budget(config.selection.budget).proponents is not None:
        return (
            f"selection.budget: {config.selection.budget!r} is for method: in2core; with method: "
            f"{method} there are no proponents: write rows, a percentage or tokens"
        )
    if config.reference.adapter is not None:
        return (
            f"reference.adapter: {config.reference.adapter!r} is for method: in2core; with method: "
            f"{method} name it in model.adapter"
        )
    if config.transfer.model is not None or config.coverage.encoder is not None:
        key = "coverage.encoder" if config.transfer.model is None else "transfer.model"
        return f"{key}: it is for method: in2core; with method: {method} expected null"
    if config.reference.finetune is not None:
        return (
            f"reference.finetune: it is for method: in2core, which takes gradients with a "
            f"fine-tuned reference model; with method: {method} expected null"
        )
    return None


def _of_first_order(config: Config) -> str | None:
    for key in ("curvature", "eta", "directions"):
        value, default = getattr(config.weights, key), WeightsConfig.model_fields[key].default
        if value != default:
            return (
                f"weights.{key}: {value!r} is for weights.order: 2; with weights.order: 1 the step "
                "size goes to zero and curvature plays no part: leave it out"
            )
    return None


def _of_second_order(config: Config) -> str | None:
    """What the Taylor expansion of the mean target loss does not go with."""
    given = {
        "gradients.normalize": (config.gradients.normalize, False, "gradients of unit length"),
        "selection.combine": (config.selection.combine, "mean", "several losses taken in turn"),
    }
    if not METHODS[config.method].steps:
        able = " or ".join(those_that("steps"))
        return f"weights.order: 2 is for method: {able}, not {config.method}"
    for key, (value, expected, why) in given.items():
        if value != expected:
            return (
                f"{key}: {value!r}, and weights.order: 2 minimises a Taylor expansion of the mean "
                f"target loss, which does not hold for {why}; expected {str(expected).lower()}"
            )
    budget = parse_budget(config.selection.budget)
    if budget.tokens is not None:
        return (
            f"selection.budget: {config.selection.budget!r}, and with weights.order: 2 lambda is "
            "found for a number of rows; expected rows or a percentage"
        )
    if config.selection.per_source:
        return (
            "selection.per_source: the programme of weights.order: 2 has no quotas; drop them or "
            "use weights.order: 1"
        )
    drawn = METHODS[config.method].draws_landmarks
    if drawn and config.landmarks.choose not in ("uniform", "stratified"):
        return (
            f"landmarks.choose: {config.landmarks.choose!r}, and with weights.order: 2 it is not "
            "a score alone that decides on a row; expected uniform or stratified"
        )
    return _of_curvature(config)


def _of_curvature(config: Config) -> str | None:
    weights, exact = config.weights, config.gradients.projection == "exact"
    if weights.curvature == "hvp" and exact:
        return (
            "gradients.projection: exact keeps no gradients of candidates, whose coefficients "
            "weights.curvature: hvp needs; expected kronecker, none or another projection, or "
            "weights.curvature: fisher"
        )
    if weights.curvature == "hvp" and weights.directions > config.landmarks.count:
        return (
            f"weights.directions: {weights.directions} directions cannot be spanned by "
            f"landmarks.count: {config.landmarks.count} rows; expected fewer"
        )
    means = [
        name
        for name, each in config.targets.items()
        if each.per == "group" or each.group_by is not None
    ]
    if exact and means:
        return (
            f"targets.{means[0]}.per: with gradients.projection: exact only products with a "
            "group's mean gradient are kept, and weights.curvature: fisher needs those with every "
            "target row; expected per: row without group_by, or another projection"
        )
    return None
