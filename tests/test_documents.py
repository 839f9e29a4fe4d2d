"""The README and docs/: every command, option, key, config, link, file and name is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from documents import (
    PAGES,
    ROOT,
    anchors,
    commands,
    complaint_of,
    configs,
    keys,
    known_key,
    links,
    spans,
    words_of,
)

from influence.cli import app, main
from influence.config_loading import parse_config
from influence.errors import InputError
from influence.methods import NAMES

REPOSITORY = ("influence/", "ray_jobs/", "tests/", "docs/", "docker/", "examples/", "benchmarks/")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pages
def test_commands_and_their_options_exist(page: Path) -> None:
    wrong = []
    for said in commands(page):
        complaint = complaint_of(words_of(said.text), app)
        if complaint is not None:
            wrong.append(f"{said}\n    {complaint}")
    assert not wrong, "\n".join(["commands that do not run:", *wrong])


@pages
def test_keys_exist(page: Path) -> None:
    wrong = [str(said) for said in keys(page) if not known_key(said.text)]
    assert not wrong, "\n".join(["keys that a config does not have:", *wrong])


@pages
def test_configs_are_valid(page: Path) -> None:
    wrong = []
    for said, data in configs(page):
        refusals = [why for method in NAMES if (why := refusal(data, method))]
        if len(refusals) == len(NAMES):  # a key may be for one method alone
            wrong.append(f"{said.page}:{said.line}: {refusals[0]}")
    assert not wrong, "\n".join(["configs that are refused:", *wrong])


def refusal(data: dict[str, Any], method: object) -> str | None:
    """Why a part of a config, with what has no default, is refused; None if it is not."""
    base: dict[str, Any] = {
        "method": method,
        "run": "runs/x",
        "model": {"name": "m"},
        "data": {"candidates": ["c"]},
        "targets": {"t": {"path": "p"}},
    }
    for key, value in data.items():
        inner = base.get(key)
        both = isinstance(inner, dict) and isinstance(value, dict) and key != "targets"
        base[key] = {**inner, **value} if both else value
    try:
        parse_config(base)
    except InputError as error:
        return str(error)
    return None


@pages
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for said in links(page):
        name, _, anchor = said.text.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists():
            wrong.append(f"{said}: no such file")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            wrong.append(f"{said}: no such heading; there are {sorted(anchors(target))}")
    assert not wrong, "\n".join(wrong)


@pages
def test_files_and_python_names_exist(page: Path) -> None:
    wrong = []
    # A block that begins with a path shows a file that the reader is to make.
    shown = set(re.findall(r"^```\w*\n# (\S+)$", page.read_text(), flags=re.M))
    for said in spans(page):
        word = said.text.removeprefix("../").split()[0].rstrip(":,")
        ours = word.startswith(REPOSITORY) and word not in shown
        if ours and not re.search(r"[A-Z*<{]|\.\.\.", word.split("/")[-1]):
            wrong += [f"{said}: no such file"] if not (ROOT / word).exists() else []
        dotted = re.fullmatch(r"((?:influence|ray_jobs)(?:\.\w+)+)(?:\(.*\))?", said.text)
        if dotted is not None and not resolves(dotted.group(1)):
            wrong.append(f"{said}: no such module, class or function")
    assert not wrong, "\n".join(wrong)


def resolves(dotted: str) -> bool:
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            node: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            node = getattr(node, part, None)
        return node is not None
    return False


def test_every_page_is_linked_from_the_index() -> None:
    linked = {said.text.partition("#")[0] for said in links(ROOT / "README.md")}
    missing = [
        p.name for p in PAGES if p.parent == ROOT / "docs" and f"docs/{p.name}" not in linked
    ]
    assert not missing, f"README.md does not link {missing}"


def test_what_is_checked_is_found() -> None:
    found = {
        "commands": sum(1 for page in PAGES for _ in commands(page)),
        "keys": sum(1 for page in PAGES for _ in keys(page)),
        "configs": sum(1 for page in PAGES for _ in configs(page)),
        "links": sum(1 for page in PAGES for _ in links(page)),
    }
    least = {"commands": 60, "keys": 60, "configs": 15, "links": 25}
    few = {name: count for name, count in found.items() if count < least[name]}
    assert not few, f"the pages were not understood: {few} of at least {least}"
    assert complaint_of(words_of("influence select job.yaml --no-such"), app), "options"
    assert complaint_of(words_of("influence cache prun x"), app), "commands"
    assert complaint_of(words_of("influence plan j.yaml --set selection.bugdet=5"), app), "keys"
    assert not known_key("selection.bugdet"), "keys"


def test_every_command_that_is_named_has_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    found = [words_of(said.text) for page in PAGES for said in commands(page)]
    named = {tuple(words[1:2]) for words in found if words[0] == "influence"}
    for words in sorted(named - {()}):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--help"])
        assert ended.value.code == 0, f"influence {words[0]} --help: {capsys.readouterr().err}"
    assert len(named) >= 8, f"only {named}"
