"""The Python interface: its examples run, and it is what the commands do."""

from __future__ import annotations

import doctest
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
import yaml
from tiny_run import Setup, scores_of, selection_of, tiny_config

import influence
import ray_jobs
from influence.cli import main
from influence.config_loading import dump_config
from influence.errors import InputError

GUIDE = Path(__file__).parent.parent / "docs" / "python.md"
#: The order in which the examples build upon each other: a config, a plan, a run, its files.
ORDER = (
    *("load_config", "make_plan", "compare_precisions", "run_select", "read_status"),
    *("read_manifest", "read_scores", "read_selection", "read_fidelity", "build_report"),
    *("run_finetune", "read_training", "export_vectors", "list_cache", "prune_cache"),
    *("run_evaluate", "read_evaluation"),
)


@pytest.fixture
def notebook(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in with a job.yaml; the example's paths are relative to it."""
    config = tiny_config(setup, "runs/job", finetune__epochs=1, finetune__rank=2)
    data = yaml.safe_load(dump_config(config))
    # What a person would write: no defaults, so that a method's own ones apply.
    kept = ("run", "model", "data", "targets", "embedding", "landmarks", "replicas")
    data = {name: data[name] for name in kept}
    data["gradients"] = {"side": 8, "dim": 64}
    data["finetune"] = {"epochs": 1, "rank": 2}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(data))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_import_is_cheap_and_every_name_is_there() -> None:
    code = (
        "import sys, influence, ray_jobs\n"
        "heavy = {'torch', 'pyarrow', 'ray', 'numpy', 'pydantic'} & {*sys.modules}\n"
        "sys.exit(f'import influence brings {heavy} along' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    modules = {module.name for module in pkgutil.iter_modules(influence.__path__)}
    for name in influence.__all__:
        assert name not in modules, f"{name}: importing that module would hide the function"
        assert inspect.isfunction(getattr(influence, name)), f"influence.{name} is no function"
    with pytest.raises(AttributeError, match="no_such"):
        influence.no_such  # noqa: B018


def test_jobs_on_ray_take_the_same_arguments() -> None:
    for name in ray_jobs.__all__:
        here, there = (
            [(p.name, p.kind, p.annotation) for p in inspect.signature(f).parameters.values()]
            for f in (getattr(influence, name), getattr(ray_jobs, name))
        )
        assert here == there, f"{name}: a notebook that moves to a cluster would have to change"


def test_every_example_in_a_docstring_runs(notebook: Path) -> None:
    assert sorted(ORDER) == sorted(influence.__all__), "a public name whose example is not run"
    known: dict[str, Any] = {"influence": influence}
    finder = doctest.DocTestFinder(recurse=False)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    for name in ORDER:
        (example,) = finder.find(getattr(influence, name), name, module=False)
        assert example.examples, f"influence.{name}: its docstring has no example"
        example.globs = known  # the same for all: later examples use what earlier ones made
        told: list[str] = []
        failed, _ = doctest.DocTestRunner(optionflags=flags).run(
            example, out=told.append, clear_globs=False
        )
        assert not failed, f"the example of influence.{name}:\n{''.join(told)}"


def test_the_page_on_python_runs_as_a_notebook(notebook: Path) -> None:
    text = GUIDE.read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 5, "docs/python.md shows hardly anything"
    known: dict[str, Any] = {}
    for number, block in enumerate(blocks, 1):
        if "ray_jobs" not in block:  # the same calls on a cluster
            exec(compile(block, f"docs/python.md, block {number}", "exec"), known)
    named = set(re.findall(r"`(?:influence|ray_jobs)\.([a-z_]+)\(", text))
    missing = set(influence.__all__) - named - set(re.findall(r"influence\.([a-z_]+)\(", text))
    assert not missing, f"docs/python.md does not name {sorted(missing)}"


def test_a_mapping_and_keywords_are_a_file_and_set(notebook: Path) -> None:
    data = yaml.safe_load((notebook / "job.yaml").read_text())
    data["run"] = Path("runs") / "job"  # as a notebook has it
    sets = {"selection__budget": "10%", "targets__sums__limit": 3, "targets.mixed.per": "group"}
    mine = influence.load_config(data, **sets)
    main_ = influence.load_config("job.yaml")
    assert mine.selection.budget == "10%"
    assert mine.targets["sums"].limit == 3
    assert mine.targets["mixed"].per == "group"
    assert mine.model_dump(exclude={"selection", "targets"}) == main_.model_dump(
        exclude={"selection", "targets"}
    ), "a keyword changed another key, or the mapping is read differently from the file"
    assert data["targets"]["sums"].get("limit") != 3, "the caller's own mapping was changed"
    for bad, words in (
        ({"selection__budget": "lots"}, "budget"),
        ({"selektion__budget": 5}, "did you mean 'selection'"),
        ({"run__inner": 5}, "not a section"),
        ({"cache": "s3://AKIAIOSFODNN7EXAMPLE:secret@bucket/x"}, "credential"),
    ):
        with pytest.raises(InputError, match=words):
            influence.load_config(data, **bad)


def test_tables_are_the_files(notebook: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = influence.load_config("job.yaml", method="random", selection__budget=9)
    with pytest.raises(InputError, match="scores: not there"):
        influence.read_scores(config.run)
    with pytest.raises(InputError, match=r"fidelity\.json: not there"):
        influence.read_fidelity(config.run)
    influence.run_select(config, quiet=True)
    scores = influence.read_scores(Path(config.run))
    assert scores.equals(scores_of(config.run)), "other rows, or another order of the parts"
    narrow = influence.read_scores(config.run, ["weight", "id"])
    assert narrow.column_names == ["weight", "id"]
    with pytest.raises(InputError, match="no_such"):
        influence.read_scores(config.run, ["no_such"])
    chosen = influence.read_selection(config.run)
    weighted = scores.filter(pc.greater(scores["weight"], 0))
    assert sorted(chosen["influence_score"].to_pylist()) == sorted(weighted["score"].to_pylist())
    ids = [row["id"] for row in selection_of(config.run)]
    assert chosen["id"].to_pylist() == ids, "not in the order of selection.jsonl"
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["cache", "list", config.cache_url, "--json"])
    assert ended.value.code == 0
    listing = influence.list_cache(config.cache_url)
    assert json.loads(capsys.readouterr().out) == listing.model_dump(mode="json"), (
        "the command and the function list different things"
    )


def test_the_home_of_each_name_is_its_own() -> None:
    for name in influence.__all__:
        home = getattr(influence, name).__module__
        assert getattr(importlib.import_module(home), name) is getattr(influence, name), name
