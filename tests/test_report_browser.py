"""The report in Chromium: nothing is fetched, nothing of the pool runs, light and dark."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import Seen, look
from run_fixture import write_run
from tiny_run import Setup, conversation, tiny_config

from influence.one_process import run_select
from influence.report import build_report

pytestmark = pytest.mark.figures

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "evidence"
#: Ways out of an element, an attribute, a style sheet or a script, and into one.
PLANTED = (
    "<script>window.planted = 1</script>",
    "<img src=x onerror='window.planted = 2'>",
    "</script><script>window.planted = 3</script>",
    "</style><svg onload=window.planted=4>",
    '" onmouseover="window.planted = 5" onfocus="window.planted = 6" x="',
    "' onerror='window.planted = 7' x='",
    '</pre></td></table></details><a href="javascript:window.planted = 8">read on</a>',
    '<img src="http://127.0.0.1:9/pixel.png"><link rel=stylesheet href=http://127.0.0.1:9/a.css>',
    '<iframe src="javascript:parent.planted = 9"></iframe>',
    "javascript:window.planted = 10",
    "{{ 7 * 7 }}]]><!--<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/'>",
)
POISON = "".join(PLANTED)
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
QUESTIONS = (
    "window.planted",
    "document.querySelectorAll('script, img, iframe, link, object, embed, form, base').length",
    "[...document.links].map(a => a.getAttribute('href')).filter(h => !h.startsWith('#'))",
    "[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())"
    ".filter(n => n.startsWith('on'))",
    "document.documentElement.textContent",
)


def without_policy(page: Path) -> Path:
    """A copy of the page that its escaping alone protects."""
    bare, found = POLICY.subn("", page.read_text())
    assert found == 1, "the page has no Content-Security-Policy, or several"
    copy = page.with_name("bare.html")
    copy.write_text(bare)
    return copy


def assert_inert(seen: Seen, planted: tuple[str, ...], where: str) -> None:
    flag, active, links, handlers, text = seen.answers
    assert flag is None, f"{where}: text of the pool ran as script number {flag}"
    assert seen.console == [], f"{where}: the console is not empty"
    assert seen.requests == [], f"{where}: the page asked for something"
    assert seen.blocked == [], f"{where}: the page tried what its own policy forbids"
    assert active == 0, f"{where}: an element that loads or runs something"
    assert links == [], f"{where}: links that leave the page"
    assert handlers == [], f"{where}: event handlers"
    for planned in planted:
        assert planned in text, f"{where}: {planned!r} is not shown as it is"


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run whose ids, sources, messages, groups, files, errors are all hostile."""
    folder = write_run(
        tmp_path_factory.mktemp("poisoned"),
        failed=len(PLANTED),
        names=("gsm8k", *(f"bbh/{text}" for text in PLANTED[:4]), PLANTED[1]),
        sources=("plain", *PLANTED),
        text=POISON,
    )
    (folder / "evaluation.json").write_text(json.dumps(evaluations()))
    return Path(build_report(str(folder)))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of evaluations without a selection, with plots, a config and hostile names."""
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "evaluation.json").write_text(json.dumps(evaluations()))
    done = write_run(tmp_path_factory.mktemp("done")) / "manifest.json"
    own = folder / "evaluations" / "downstream"
    own.mkdir(parents=True)
    (own / "manifest.json").write_text(done.read_text())
    (own / "config.yaml").write_text(f"# {POISON}")
    return Path(build_report(str(folder)))


def evaluations() -> dict[str, Any]:
    """A table alone, and two real results with figures; targets, methods and models are hostile."""
    effect = {"members": 1.0, "first": 2.0, "second": 3.0}
    about = {"run": POISON, "rows": 3, "of": 9, "without_gradient": 0}
    group = {"targets": {POISON: effect}, "about": {**about, "model": POISON, "adapter": POISON}}
    found = {"group_influence": group}
    for name in ("downstream", "fidelity"):
        real = json.loads((RESULTS / f"{name}.json").read_text())[name]
        found[name] = renamed(
            real, {"gsm8k": POISON, "rds": POISON, real["about"]["model"]: POISON}
        )
    return found


def renamed(value: Any, names: dict[str, str]) -> Any:
    """With other strings and keys wherever those stand alone."""
    if isinstance(value, dict):
        return {names.get(k, k): renamed(v, names) for k, v in value.items()}
    if isinstance(value, list):
        return [renamed(each, names) for each in value]
    return names.get(value, value) if isinstance(value, str) else value


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_hostile_text_is_inert_in_a_browser(poisoned: Path, dark: bool) -> None:
    assert_inert(look(poisoned, QUESTIONS, dark=dark), PLANTED, "the page")


@pytest.mark.parametrize("page", ["poisoned", "evaluated"])
def test_escaping_alone_is_enough(page: str, request: pytest.FixtureRequest) -> None:
    bare = without_policy(request.getfixturevalue(page))
    assert_inert(look(bare, QUESTIONS), PLANTED, "the page without its policy")


def test_evaluations_have_an_inert_page_with_their_plots(evaluated: Path) -> None:
    figures = "document.querySelectorAll('#evaluation figure svg').length"
    seen = look(evaluated, [*QUESTIONS, figures])
    *answers, count = seen.answers
    assert count >= 5, "the plots of accuracy against cost are not on the page"
    assert_inert(replace(seen, answers=answers), PLANTED, "the page of evaluations")


def test_a_page_that_does_not_escape_is_found_out(poisoned: Path) -> None:
    html = poisoned.read_text()
    raw = "".join(PLANTED[i] for i in (0, 1, 7))
    leaky = poisoned.with_name("leaky.html")
    leaky.write_text(POLICY.sub("", html).replace("<main>", f"<main>{raw}", 1))
    seen = look(leaky, QUESTIONS)
    assert seen.answers[0] is not None, "the tests above could not see a script that runs"
    assert any("127.0.0.1:9" in url for url in seen.requests), "... nor a request"
    assert seen.answers[1] >= 3, "... nor an element that loads something"
    leaky.write_text(html.replace("<main>", f"<main>{raw}", 1))
    seen = look(leaky, QUESTIONS)
    assert seen.answers[0] is None, "the policy does not stop inline scripts"
    assert not any("127.0.0.1" in url for url in seen.requests), "the policy lets requests out"
    assert seen.blocked, "what the policy stops is not seen here"
    assert any(level == "error" for level, _ in seen.console), "the console is not seen here"


def test_light_and_dark_are_both_legible(poisoned: Path) -> None:
    question = (
        "['body', 'h1', 'td', 'figure svg', '.soft'].map(s => document.querySelector(s))"
        ".filter(e => e).map(e => getComputedStyle(e).color)"
        ".concat(getComputedStyle(document.body).backgroundColor)"
    )
    shown = {dark: look(poisoned, [question], dark=dark).answers[0] for dark in (False, True)}
    assert shown[False][-1] != shown[True][-1], "the page does not follow the reader's dark mode"
    for dark, (*inks, ground) in shown.items():
        for ink in inks:
            ratio = contrast(ink, ground)
            assert ratio >= 4.5, f"dark={dark}: {ink} on {ground} has a contrast of {ratio:.1f}"


def contrast(one: str, other: str) -> float:
    """WCAG 2.1: (brighter + 0.05) / (darker + 0.05) of relative luminances."""

    def luminance(color: str) -> float:
        parts = [int(p) / 255 for p in re.findall(r"\d+", color)[:3]]
        red, green, blue = (
            p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, bright = sorted((luminance(one), luminance(other)))
    return (bright + 0.05) / (dark + 0.05)


def test_a_run_on_a_hostile_pool_has_an_inert_report(setup: Setup, tmp_path: Path) -> None:
    draw = random.Random(0)
    pool, dev = tmp_path / "pool.jsonl", tmp_path / "dev.jsonl"
    rows = [
        {
            "id": f"{i}{text}",
            "source": text,
            "messages": [
                {"role": "user", "content": text},
                {"role": "assistant", "content": conversation(draw)[1]["content"] + text},
            ],
        }
        for i, text in enumerate(PLANTED * 2)
    ]
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    targets = [{"id": text, "family": text, "messages": conversation(draw)} for text in PLANTED[:5]]
    dev.write_text("".join(json.dumps(row) + "\n" for row in targets))
    config = tiny_config(
        setup,
        tmp_path / "run",
        data__candidates=[str(pool)],
        targets={"<img\fsrc=x\fonerror=planted=11>": {"path": str(dev), "group_by": "family"}},
        landmarks__count=12,
        selection__budget=6,
    )
    summary = run_select(config, quiet=True)
    page = Path(summary["report"])
    for shown in (page, without_policy(page)):
        assert_inert(look(shown, QUESTIONS), PLANTED[:1], shown.name)
