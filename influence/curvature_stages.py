"""The second order's own steps of a job, between the gradients and the scores.

The landmarks' gradients say which directions there are; their full vectors are weighted sums over
the landmarks' rows, and the Hessian is multiplied with each on the targets' rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from influence.config import Config
from influence.cost import check_direction_bytes
from influence.fingerprints import Fingerprint, fingerprint, optimizer_values
from influence.job import Job, run_units, timed
from influence.optimizer_use import scaled_stages
from influence.second_order_plan import DirectionPlan, MadeVectors
from influence.units import ExactUnits, Unit, range_units, sparse_units

STAGE = "second_order"


def second_order(job: Job, reduce: Any, exact: ExactUnits) -> None:
    """What the curvature is made of, once the gradients' shards of `exact` are there.

    Raises:
        InputError: more directions than a replica can hold.
        ShardsFailedError: a unit failed for good (all others are committed).
    """
    with timed(job, STAGE):
        plan: DirectionPlan | None = reduce.begin_second_order(exact)
    along, made = None, None
    if has_offset(job.config):
        along = offset_product_units(job)
        run_units(job, [unit for units in along.values() for unit in units])
    if plan is not None:
        made = _directions(job, plan)
    with timed(job, STAGE, quiet=True):
        reduce.take_second_order(made, along)


def has_offset(config: Config) -> bool:
    """Whether the step moves the parameters by anything but the candidates' gradients."""
    return config.optimizer.state is not None


def offset_product_units(job: Job) -> dict[str, list[Unit]]:
    """Products of every target row's gradient with the optimiser's offset, by target."""
    print_ = _of_gradients(job, optimizer_values(job.config))
    job.fingerprints["offset_products"] = print_
    rows = job.config.replicas.gradient_rows_per_shard
    return {
        name: range_units("offset_products", print_.hex, files, rows)
        for name, files in job.target_files.items()
    }


def direction_units(job: Job, plan: DirectionPlan) -> list[Unit]:
    """One unit for each direction, over all of the landmarks' rows; made in one pass."""
    digest = hashlib.blake2b(digest_size=16)
    for file, rows in plan.rows:
        digest.update(repr((file.content_hash, [int(row) for row in rows])).encode())
    own: dict[str, Any] = {"rows": digest.hexdigest()}
    if "gradients" in scaled_stages(job.config):
        own |= optimizer_values(job.config)
    job.fingerprints["directions"] = _of_gradients(job, {**own, "weights": plan.keys})
    (file, rows), *others = plan.rows
    beside = tuple((other, tuple(members)) for other, members in others)
    return [
        Unit(
            "directions",
            _of_gradients(job, {**own, "weights": key}).hex,
            file,
            rows[0],
            rows[-1],
            rows=tuple(rows),
            needs=(key,),
            beside=beside,
        )
        for key in plan.keys
    ]


def offset_unit(job: Job) -> Unit:
    """The optimiser's offset as a full vector; the file says nothing, but a shard is of one."""
    print_ = _of_gradients(job, optimizer_values(job.config))
    job.fingerprints["offset_vector"] = print_
    file = next(iter(job.target_files.values()))[0]
    return Unit("offset_vector", print_.hex, file, 0, 0)


def hessian_fingerprint(job: Job, vectors: Sequence[Unit]) -> Fingerprint:
    """Of the stage as a whole; each product's own has its direction alone."""
    return _of_gradients(job, {"directions": [unit.key for unit in vectors]})


def product_units(
    job: Job, plan: DirectionPlan, vectors: Sequence[Unit]
) -> list[list[tuple[Unit, float]]]:
    """For each vector the units of the Hessian's products with it, with their shares."""
    job.fingerprints["hessian_products"] = hessian_fingerprint(job, vectors)
    found = []
    for vector in vectors:
        digest = _of_gradients(job, {"direction": vector.key}).hex
        found.append(
            [
                (unit, share)
                for file, rows, share in plan.targets
                for unit in sparse_units(
                    "hessian_products", digest, file, rows, len(rows), (vector.key,)
                )
            ]
        )
    return found


def _directions(job: Job, plan: DirectionPlan) -> MadeVectors:
    shape = job.model_shape
    check_direction_bytes(job.config, shape, len(plan.keys))
    vectors = direction_units(job, plan)
    if has_offset(job.config):
        vectors.append(offset_unit(job))
    run_units(job, vectors)
    products = product_units(job, plan, vectors)
    run_units(job, [unit for of_vector in products for unit, _share in of_vector])
    return MadeVectors(
        [unit.key for unit in vectors],
        [[(unit.key, share) for unit, share in of_vector] for of_vector in products],
    )


def _of_gradients(job: Job, values: dict[str, Any]) -> Fingerprint:
    """Of gradients that are neither normalised nor projected, and these values."""
    plain = dict(job.fingerprints["target_vectors"].values)
    for name in ("normalize", "optimizer", "optimizer_state"):
        plain.pop(name, None)
    return fingerprint({**plain, **values})
