"""Predicted scores of a map over embeddings, against the regressions that they come from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from influence import landmarks
from influence.errors import InputError
from influence.features import make_features
from influence.kernels import KERNELS, unit_rows
from influence.posterior import believe, no_evidence, observe, posterior_of
from influence.predictor import (
    Mapper,
    cosine_predictor,
    posterior_predictor,
    read_predictor,
    regression_predictor,
    write_predictor,
)

DRAW = np.random.default_rng(0)
# Hidden states share a large mean, which would eat the digits of a small distance.
X = unit_rows(DRAW.normal(size=(900, 24)) + 2.0)
KNOWN = np.arange(0, 900, 7)
Y = np.stack([np.sin(X[KNOWN].sum(axis=1) * 3), X[KNOWN, 0], DRAW.normal(size=len(KNOWN))], axis=1)


REST = np.setdiff1d(np.arange(900), KNOWN)


def _close(found: np.ndarray, expected: np.ndarray, scale: float) -> None:
    """Of a row that is a centre, the distance 0 is the root of what float32 leaves of it."""
    np.testing.assert_allclose(found[REST], expected[REST], atol=2e-4 * scale, rtol=0)
    np.testing.assert_allclose(found[KNOWN], expected[KNOWN], atol=5e-3 * scale, rtol=0)


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_a_regression_predicts_the_same(kernel: str):
    model = landmarks.fit(X[KNOWN], Y, kernel=kernel)
    found = Mapper(regression_predictor(model, lengths=kernel == "linear"))(X)
    expected = landmarks.predict(model, X)
    scale = np.abs(expected - expected.mean(axis=0)).max()
    _close(found.P, expected, scale)
    assert not found.variance.any()


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_a_process_believes_the_same(kernel: str):
    features = make_features(X[KNOWN[::2]], kernel=kernel)
    prior = no_evidence(features, ridge=0.02, mean=Y.mean(axis=0))
    posterior = posterior_of(observe(prior, X[KNOWN], Y))
    found = Mapper(posterior_predictor(posterior, lengths=False))(X)
    expected = believe(posterior, X)
    scale = np.abs(expected.mean - expected.mean.mean(axis=0)).max()
    _close(found.P, expected.mean, scale)
    np.testing.assert_allclose(found.variance[REST], expected.variance[REST], rtol=2e-3, atol=1e-6)


def test_cosines_with_mean_embeddings():
    means = X[:4]
    rows = X.astype(np.float16)
    found = Mapper(cosine_predictor(means))(rows)
    for i in (0, 5, 899):
        for m in range(4):
            expected = sum(float(rows[i, d]) * means[m, d] for d in range(24))
            assert found.P[i, m] == pytest.approx(expected, rel=1e-6)


def test_a_row_has_one_score_in_every_block(monkeypatch: pytest.MonkeyPatch):
    mapper = Mapper(regression_predictor(landmarks.fit(X[KNOWN], Y), lengths=False))
    whole = mapper(X)
    monkeypatch.setattr("influence.predictor._BLOCK_ENTRIES", 64 * len(KNOWN))
    parts = mapper(X)
    np.testing.assert_allclose(whole.P, parts.P, atol=1e-5)


def test_the_file_is_the_predictor_and_its_name_says_so(tmp_path: Path):
    predictor = regression_predictor(landmarks.fit(X[KNOWN], Y), lengths=True)
    key = write_predictor(str(tmp_path), predictor)
    assert write_predictor(str(tmp_path), predictor) == key
    found = read_predictor(str(tmp_path), key)
    assert found.digest == predictor.digest
    np.testing.assert_array_equal(Mapper(found)(X).P, Mapper(predictor)(X).P)
    for change in ({"bandwidth": 2.0}, {"mean": predictor.mean + 1e-12}, {"lengths": False}):
        assert replace(predictor, **change).digest != predictor.digest


def test_a_damaged_file_is_written_again_and_never_believed(tmp_path: Path):
    predictor = regression_predictor(landmarks.fit(X[KNOWN], Y), lengths=False)
    other = replace(predictor, ridge=3.0)
    key = write_predictor(str(tmp_path), predictor)
    theirs = Path(tmp_path, write_predictor(str(tmp_path), other)).read_bytes()
    for damage in (b"", theirs):
        Path(tmp_path, key).write_bytes(damage)
        if damage:
            with pytest.raises(InputError, match="not what its name says"):
                read_predictor(str(tmp_path), key)
        assert write_predictor(str(tmp_path), predictor) == key
        assert read_predictor(str(tmp_path), key).digest == predictor.digest


def test_embeddings_of_another_width_are_refused():
    mapper = Mapper(regression_predictor(landmarks.fit(X[KNOWN], Y), lengths=False))
    with pytest.raises(InputError, match="rows of 24 numbers"):
        mapper(X[:, :5])
