"""What a precision costs: the same rows in a wider one."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import Setup, tiny_config, write_config

from influence.cli import main
from influence.numerics import compare_precisions


def test_a_float32_run_is_held_against_float64(setup: Setup, tmp_path: Path) -> None:
    config = tiny_config(setup, tmp_path / "run")
    numerics = compare_precisions(config, 3)
    assert (numerics.dtype, numerics.reference) == ("float32", "float64")
    lengths = [row.tokens for row in numerics.rows]
    assert len(lengths) == 3
    assert lengths[0] < lengths[-1], "rows are not spread over lengths"
    for row in numerics.rows:
        assert 1 - 1e-6 < row.gradient_cosine <= 1 + 1e-12, "float32 gradients of another row"
        assert row.norm_ratio == pytest.approx(1, abs=1e-4)
        assert row.embedding_cosine is not None
        assert row.embedding_cosine > 1 - 1e-5


def test_bfloat16_is_less_exact_and_says_by_how_much(setup: Setup, tmp_path: Path) -> None:
    config = tiny_config(setup, tmp_path / "run", model__dtype="bfloat16")
    numerics = compare_precisions(config, 2)
    assert (numerics.dtype, numerics.reference) == ("bfloat16", "float32")
    cosines = [row.gradient_cosine for row in numerics.rows]
    assert all(0.9 < cosine < 1 - 1e-7 for cosine in cosines), "both models had one precision"


def test_plan_prints_the_comparison(
    setup: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path / "config.yaml", tiny_config(setup, tmp_path / "run"))
    with pytest.raises(SystemExit) as stopped:
        main(["plan", path, "--numerics", "2"])
    assert stopped.value.code in (0, None)
    assert "float32 against float64" in capsys.readouterr().out
