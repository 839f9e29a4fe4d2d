"""The selections that one_step.py tries: of both optimisers, in the first and the second order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from influence.config_loading import load_config
from influence.errors import InputError
from influence.one_process import run_select
from influence.resume import claim_run
from influence.run_log import read_manifest

KINDS = ("sgd", "adamw")
CURVATURES = ("fisher", "hvp")


def parse_etas(values: Sequence[str]) -> dict[str, list[float]]:
    """{optimizer: step sizes} of ETA (for both) and KIND=ETA values.

    Raises InputError for another optimizer, or for what is no number above 0.
    """
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for value in values:
        kind, equals, text = value.rpartition("=")
        try:
            eta = float(text)
        except ValueError:
            eta = -1.0
        if not eta > 0 or (equals and kind not in KINDS):
            raise InputError(
                f"--eta {value!r}: expected a step size above 0, or KIND=ETA with one of "
                f"{', '.join(KINDS)}"
            )
        for each in [kind] if equals else KINDS:
            found[each].append(eta)
    return found


def make_runs(
    path: str,
    overrides: Sequence[str],
    curvatures: Sequence[str],
    etas: Mapping[str, Sequence[float]],
    directions: int,
) -> dict[str, str]:
    """{NAME: RUN} of every optimizer's first order, and of its second with every curvature.

    The runs lie beside the `run` of the config; what is done is not done again. The second order's
    step is the largest of its optimizer's `etas`; `directions` are those of hvp. Optimizers without
    a step size have no runs.
    Raises InputError as `influence select` does, and for a run that is there with other settings.
    """
    folder = Path(load_config(path, overrides).run).parent
    runs = {}
    for kind, sizes in etas.items():
        if not sizes:
            continue
        first = [f"optimizer.kind={kind}", "weights.order=1"]
        wanted = {f"{kind}_first": first} | {
            f"{kind}_{curvature}": [
                f"optimizer.kind={kind}",
                "weights.order=2",
                f"weights.curvature={curvature}",
                f"weights.eta={max(sizes)!r}",
                *([f"weights.directions={directions}"] if curvature == "hvp" else []),
            ]
            for curvature in curvatures
        }
        for name, changes in wanted.items():
            runs[name] = str(folder / name)
            _select(path, [*overrides, *changes, f"run={runs[name]}"])
    return runs


def _select(path: str, overrides: Sequence[str]) -> None:
    config = load_config(path, overrides)
    manifest = read_manifest(config.run)
    if manifest is not None and manifest.state == "done":
        claim_run(config)  # only for its check that the settings are the same
        return
    run_select(config)
