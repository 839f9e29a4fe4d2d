"""Method In2Core (San Joaquin et al., arXiv 2408.03560); the steps are those of
`influence.in2core`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from influence import cost
from influence.config_checks import check_in2core
from influence.exact_work import plan_exact
from influence.in2core import check_beside, check_query_bytes, in2core, vector_width
from influence.in2core_work import curvature_work, together
from influence.memory_budget import parse_memory
from influence.methods.kind import Method
from influence.quantities import Quantities, StageWork, driver_seconds
from influence.sentence_encoder import TEXTS_PER_SECOND

if TYPE_CHECKING:
    from influence.planned_work import Planner


def plan(planner: Planner) -> None:
    """Gradients of all rows, DataInf's passes over them, and what the config puts beside."""
    config = planner.job.config
    kept, gradients = 1.0, None
    if config.layers == "auto":
        kept, gradients = _chosen_layers(planner)
    else:
        gradients = planner.gradients(None)
    planner.add(gradients)
    assert planner.work.exact is not None  # gradients come first
    shape, units = planner.missing.shape, planner.work.exact.units.sketches
    width = round(vector_width(config, shape) * kept)
    layers = len(shape.sizes)
    planner.add(curvature_work(units, gradients.whole, planner.columns, width, layers))
    if config.gradients.reduction != "token_max":
        planner.scores(gradients, units, width, planner.columns)
    else:
        written = planner.score_bytes = planner.score_bytes_of(units)
        planner.add(planner.missing.token_scores(units, planner.columns, width, written))
        effort = driver_seconds(1, 0.0, float(planner.counts["rows"] * (planner.columns + 1)))
        planner.add(StageWork("scores", Quantities(read=written, effort=effort), replicas=False))
    if config.transfer.model is not None:
        planner.work.notes.append(
            f"transfer: a pilot of {config.transfer.pilot:,} rows goes through "
            f"{config.transfer.model.name}, too; its bill is that of the run RUN/transfer"
        )
    if config.coverage.encoder is not None:
        targets = sum(target["rows"] for target in planner.counts["targets"].values())
        texts = targets + min(config.coverage.candidates, planner.counts["scored"])
        effort = driver_seconds(1) + texts / TEXTS_PER_SECOND
        planner.add(StageWork("coverage", Quantities(effort=effort), replicas=False))
    planner.selection(0)


def _chosen_layers(planner: Planner) -> tuple[float, StageWork]:
    """Gradients of a pilot, all layers, and then of every row those that the pilot chooses.

    Returns the part of a row's numbers that is kept, and the stage.
    """
    missing, work = planner.missing, planner.work
    chosen = work.chosen = missing.reduce.choose_pilot()
    pilot = planner.gradients(chosen)
    rows = sum(len(members) for _file, members in chosen)
    shape, config = missing.shape, planner.job.config
    effort = driver_seconds(1, cost.curvature(rows, shape.attributed, planner.columns))
    choosing = Quantities(read=3 * pilot.whole, effort=effort)
    planner.add(StageWork("layers", choosing, replicas=False))
    exact = work.exact = plan_exact(planner.job, missing.reduce, None)
    share, memory = parse_memory(config.layer_economy.memory)
    whole = 4 * vector_width(config, shape) * planner.counts["rows"]
    kept = min(1.0, share if share is not None else (memory or 0.0) / whole)
    if planner.decided is not None:
        return kept, planner.as_decided(pilot, planner.decided)
    # Under which name they will be kept is not known, nor whether they are there already.
    unknown = [replace(unit, fingerprint="unknown") for unit in exact.units.all]
    rest = missing.stage("gradients", unknown)
    work.notes.append(
        f"layers: auto: counted with all that layer_economy.memory lets be kept "
        f"({kept:.0%} of the layers' bytes), and the operations of all layers, which is "
        "the most"
    )
    return kept, together(pilot, rest, kept)


METHOD = Method(
    title="In2Core",
    run=in2core,
    plan=plan,
    needs_gradients=True,
    signed=True,
    reference_model=True,
    gradient_defaults={"parameters": "lora", "projection": "layerwise", "normalize": False},
    check=check_in2core,
    check_files=check_beside,
    check_bytes=check_query_bytes,
)
