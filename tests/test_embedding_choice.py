"""`embedding.kind: auto`: the choice against loops, and against a run that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm
from test_plan_runs import planned_and_run
from tiny_run import (
    Setup,
    assert_same_results,
    manifest_of,
    shards_in,
    tiny_config,
    write_config,
)

from influence.cache_listing import scan_cache
from influence.cache_use import use_of
from influence.config import Config
from influence.embedding_choice import priced_choice
from influence.embedding_economy import head_thresholds, look, share_to_look_at
from influence.embedding_kind import EmbeddingKind, default_kinds
from influence.embedding_record import EmbeddingChoice
from influence.embedding_reduce import Judged
from influence.errors import InputError
from influence.history import decision_digest
from influence.kernels import KERNELS, bandwidth_of, diagonal
from influence.load import Load
from influence.model_shape import model_shape
from influence.one_process import run_select
from influence.pipeline import prepare
from influence.plan import make_plan
from influence.progress import Progress
from influence.report import build_report
from influence.vector_export import export_vectors

CHOICES = [
    {"kind": "hidden", "blocks": 1},
    {"kind": "jvp", "blocks": 2},
    {"kind": "rds"},
]


def auto(**changes: Any) -> dict[str, Any]:
    return {"kind": "auto", "pilot": 16, "choices": CHOICES, **changes}


def auto_config(setup: Setup, folder: Path, name: str = "auto", **changes: Any) -> Config:
    cache = str(folder / "cache")
    return tiny_config(setup, folder / name, embedding=auto(), cache=cache, **changes)


def choice_of(config: Config) -> EmbeddingChoice:
    found = manifest_of(config.run).embedding
    assert found is not None, "the choice is not in the manifest"
    return found


@pytest.mark.parametrize("choose", ["uniform", "certified"])
def test_the_selection_is_that_of_a_run_that_names_the_choice(
    setup: Setup, tmp_path: Path, choose: str
) -> None:
    config = auto_config(setup, tmp_path, landmarks__choose=choose)
    run_select(config, quiet=True)
    found, stages = choice_of(config), manifest_of(config.run).stages
    settings = EmbeddingKind(*found.settings)._asdict()
    made = shards_in(config.cache_url)
    other = tiny_config(
        setup,
        tmp_path / "named",
        embedding=settings,
        cache=config.cache_url,
        landmarks__choose=choose,
    )
    run_select(other, quiet=True)
    assert_same_results(config.run, other.run, "the chosen embedding is not the one that is named")
    assert shards_in(config.cache_url) == made, "shards are not shared with a run that names it"
    named = manifest_of(other.run).stages["embedding"]
    assert stages["embedding"].fingerprint == named.fingerprint
    assert stages["embedding"].planned == named.planned
    assert stages["pilot"].computed == stages["pilot"].shards > 0


def test_the_choice_is_kept_and_what_it_cost_is_not_paid_again(
    setup: Setup, tmp_path: Path
) -> None:
    config = auto_config(setup, tmp_path)
    run_select(config, quiet=True)
    found = choice_of(config)
    page = Path(build_report(config.run)).read_text()
    section = page[page.index('<section id="embedding">') :]
    section = section[: section.index("</section>")]
    for option in found.options:
        assert option.label in section, "an embedding that was considered is not shown"
    # Somebody else's choice of the same question stands, whatever the figures would say here.
    (kept,) = Path(config.cache_url, "choices").iterdir()
    last = max(found.options, key=lambda option: option.cost)
    other = found.model_copy(update={"chosen": last.label, "settings": last.settings})
    kept.write_text(other.model_dump_json())
    run_select(config, quiet=True)
    assert choice_of(config).chosen == last.label, "a resume chose again"
    assert "pilot" not in manifest_of(config.run).stages
    notes = make_plan(config).notes
    assert any(note.startswith(f"embedding: {last.label}; ") for note in notes)
    assert any("rows to look at" in note for note in notes), "the plan does not show the table"
    listed = scan_cache(config.cache_url)
    assert not listed.foreign, "the cache calls its own choices foreign"


def test_the_choice_is_the_same_without_the_record(setup: Setup, tmp_path: Path) -> None:
    config = auto_config(setup, tmp_path)
    run_select(config, quiet=True)
    first = choice_of(config)
    (kept,) = Path(config.cache_url, "choices").iterdir()
    kept.unlink()
    shards = shards_in(config.cache_url)
    run_select(config, quiet=True)
    assert choice_of(config) == first, "the same pilot says something else"
    assert shards_in(config.cache_url) == shards, "the pilot's shards are not reused"
    assert manifest_of(config.run).stages["pilot"].computed == 0


def test_costs_are_embeddings_and_the_exact_scores_that_they_leave(
    setup: Setup, tmp_path: Path
) -> None:
    config = auto_config(setup, tmp_path)
    run_select(config, quiet=True)
    found = choice_of(config)
    assert [option.label for option in found.options] == [
        "hidden, 1 block",
        "jvp, 2 blocks, 2 rank1 tangents",
        "rds",
    ]
    for option in found.options:
        expected = found.candidates * option.flops + option.look_at * found.gradient_flops
        assert option.cost == pytest.approx(expected)
        assert 0 < option.look_at <= found.candidates - found.landmarks
    assert found.chosen == min(found.options, key=lambda option: option.cost).label
    of_all = found.candidates * found.gradient_flops
    dear = min(option.cost for option in found.options) >= of_all
    assert ("`method: exact`" in found.why) == dear, "exact scores of all cost less, and it is said"
    assert (found.candidates, found.landmarks) == (64, 24)
    assert 0 < found.pilot <= 16, "landmarks among the random rows count twice"


def test_a_plan_counts_the_pilot_and_the_dearest(setup: Setup, tmp_path: Path) -> None:
    """With one embedding to choose from the dearest is the one, and a plan is exact."""
    config = auto_config(setup, tmp_path, embedding__choices=CHOICES[1:2])
    plan = planned_and_run(config)
    assert any("no pilot was run yet" in note for note in plan.notes)
    again = planned_and_run(config.model_copy(update={"run": f"{config.run}-again"}))
    assert not any("no pilot was run yet" in note for note in again.notes)
    several = make_plan(auto_config(setup, tmp_path, "several"))
    (note,) = [note for note in several.notes if "no pilot was run yet" in note]
    assert "jvp, 2 blocks, 2 rank1 tangents, the dearest of 3" in note


def test_a_prune_keeps_and_an_export_finds_the_chosen_embedding(
    setup: Setup, tmp_path: Path
) -> None:
    config = auto_config(setup, tmp_path)
    with pytest.raises(InputError, match="no run that has chosen its embedding"):
        export_vectors(config, "embedding", str(tmp_path / "early"), command="influence select")
    run_select(config, quiet=True)
    used = use_of(write_config(tmp_path / "config.yaml", config), config.cache_url).places
    made = {tuple(key.split("/")[:2]) for key in shards_in(config.cache_url)}
    assert made <= set(used), "a prune would remove shards of the pilot"
    done = export_vectors(config, "embedding", str(tmp_path / "out"), command="influence select")
    assert done.rows["candidates"] > 0
    assert not done.missing


def judged(share: float) -> Judged:
    return Judged(share, 0.5, 0.5, 8, (100, 50), 0.05)


@pytest.mark.parametrize(
    ("choices", "shares", "expected"),
    [
        # A cheap one that tells as much as a dear one.
        (["hidden", "rds"], [0.1, 0.1], "hidden, 1 block"),
        # A cheap one that tells nothing: 0.85 of all rows to look at cost more than a dear one.
        (["hidden", "rds"], [0.95, 0.1], "rds"),
        # The dear one saves fewer gradients than it costs.
        (["hidden", "rds"], [0.100, 0.099], "hidden, 1 block"),
        # Equal embeddings: the first one.
        (["hidden", "hidden"], [0.3, 0.3], "hidden, 1 block"),
    ],
)
def test_the_least_expected_cost_is_chosen(
    setup: Setup, tmp_path: Path, choices: list[str], shares: list[float], expected: str
) -> None:
    config = auto_config(setup, tmp_path)
    kinds = [EmbeddingKind(kind, 1, 2, "rank1", 4096) for kind in choices]
    load = Load(10_000, 2_000_000, 1_000_000, 500_000_000)
    found = priced_choice(
        config, model_shape(config), load, 8, [*zip(kinds, map(judged, shares), strict=True)]
    )
    assert found.chosen == expected, found.why
    assert found.settings == kinds[choices.index(expected.split(",")[0])]
    assert found.options[0].look_at == round(shares[0] * 9_900)


def test_an_informative_embedding_leaves_fewer_rows_to_look_at() -> None:
    rng = np.random.default_rng(1)
    good = rng.normal(size=(300, 6))
    noise = rng.normal(size=(300, 6))
    Y = np.tanh(good[:, :3]) + 0.05 * rng.normal(size=(300, 3))
    of = {
        name: look(
            X[:200] / np.linalg.norm(X[:200], axis=1, keepdims=True),
            Y[:200],
            X[200:] / np.linalg.norm(X[200:], axis=1, keepdims=True),
            np.eye(3),
            share=0.1,
            recall=0.9,
            shared=False,
            kernel="laplace",
            damping=0.01,
        ).share
        for name, X in (("good", good), ("noise", noise))
    }
    assert of["good"] < 0.6 * of["noise"], of
    assert of["noise"] > 0.7, "an embedding that says nothing cannot tell which rows to look at"


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kernel", ["rbf", "cosine"])
def test_rows_to_look_at_are_those_of_refits_without_each_landmark(
    shared: bool, kernel: str
) -> None:
    rng = np.random.default_rng(2)
    X, Z = rng.normal(size=(30, 4)), rng.normal(size=(11, 4))
    Y = np.stack([X[:, 0] + 0.3 * rng.normal(size=30), np.abs(X[:, 1])], axis=1)
    found = look(
        X, Y, Z, np.eye(2), share=0.2, recall=0.8, shared=shared, kernel=kernel, damping=0.1
    )
    width = bandwidth_of(kernel, X)
    ridge, centre = 0.1 * float(np.mean(diagonal(kernel, X))), Y.mean(axis=0)

    def believed(known: list[int], x: np.ndarray) -> tuple[np.ndarray, float]:
        inner = KERNELS[kernel](X[known], X[known], width) + ridge * np.eye(len(known))
        cross = KERNELS[kernel](X[known], x[None], width)[:, 0]
        mean = centre + cross @ np.linalg.solve(inner, Y[known] - centre)
        own = float(diagonal(kernel, x[None])[0])
        return mean, float(own - cross @ np.linalg.solve(inner, cross) + ridge)

    everything = list(range(30))
    left_out = [believed([j for j in everything if j != i], X[i]) for i in everything]
    z = [(Y[i] - mean) / np.sqrt(var) for i, (mean, var) in enumerate(left_out)]
    scale = np.sqrt(np.mean(np.square(z), axis=0))
    if shared:
        largest = sorted((max(row) for row in Y.tolist()), reverse=True)
        tau = np.full(2, (largest[5] + largest[6]) / 2)
    else:
        depth, picked = 0, set()
        while len(picked) < 6:
            depth += 1
            picked = {int(i) for c in (0, 1) for i in np.argsort(-Y[:, c])[:depth]}
        tau = np.array([np.sort(Y[:, c])[::-1][depth - 1 : depth + 1].mean() for c in (0, 1)])
    chance = []
    for mean, var in [*left_out, *(believed(everything, z) for z in Z)]:
        below = norm.cdf((tau - mean) / (scale * np.sqrt(var)))
        chance.append(1 - float(np.prod(below)))
    wanted, share, had = 0.8 * sum(chance), 0.0, 0.0
    for each in sorted(chance, reverse=True):
        if had + each >= wanted:
            share += (wanted - had) / each
            break
        had, share = had + each, share + 1
    np.testing.assert_allclose(found.loo, [mean for mean, _ in left_out], atol=1e-8)
    assert found.share == pytest.approx(share / len(chance), abs=1e-6)
    assert found.members == pytest.approx(np.mean(chance), abs=1e-8)


def test_share_and_thresholds_at_their_ends() -> None:
    assert share_to_look_at(np.full(8, 0.5), 0.75) == pytest.approx(0.75), "no row is likelier"
    assert share_to_look_at(np.array([0.0, 1.0, 0.0, 0.0]), 0.5) == pytest.approx(0.125)
    assert share_to_look_at(np.zeros(4), 0.9) == 0.0
    scores = np.array([[3.0, 0.0], [2.0, 1.0], [1.0, 5.0]])
    assert head_thresholds(scores, 3, shared=True).tolist() == [-np.inf] * 2
    assert head_thresholds(scores, 1, shared=True).tolist() == [4.0, 4.0]
    assert head_thresholds(scores, 2, shared=False).tolist() == [2.5, 3.0]
    with pytest.raises(InputError, match="a head of 4 rows out of 3"):
        head_thresholds(scores, 4, shared=True)


def test_default_embeddings_fit_into_the_model() -> None:
    assert [kind.label for kind in default_kinds(30)] == [
        "hidden, 2 blocks",
        "jvp, 2 blocks, 2 rank1 tangents",
        "hidden, 4 blocks",
        "jvp, 4 blocks, 2 rank1 tangents",
        "rds",
    ]
    assert len(default_kinds(2)) == 3, "equal embeddings are tried twice"


def test_what_decides_nothing_does_not_ask_anew(setup: Setup, tmp_path: Path) -> None:
    def digest(**changes: Any) -> str:
        config = tiny_config(setup, tmp_path / "run", embedding=auto(), **changes)
        return decision_digest(prepare(config, Progress(quiet=True)))

    plain = digest()
    for same in (
        {"evaluation": {"fidelity": {}}},
        {"contamination": None},
        {"contamination": {"action": "keep"}},
        {"finetune": {"rank": 2}},
        {"replicas__max": 2},
    ):
        assert digest(**same) == plain, f"{same}: the pilot is judged anew"
    for other in (
        {"contamination": {"action": "drop"}},
        {"selection__budget": 11},
        {"landmarks__damping": 0.1},
        {"gradients__side": 4},
        {"seed": 1},
    ):
        assert digest(**other) != plain, f"{other}: decides other rows"
