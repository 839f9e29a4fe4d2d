"""The report page: its numbers against the run's files, hostile text, size, missing parts."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_fixture import write_run
from scipy.stats import spearmanr

from influence.errors import InputError
from influence.report import build_report
from influence.report_data import choose_drawn, effective_numbers, read_run, source_table
from influence.report_format import decimal, percent, seconds, significant

pytestmark = pytest.mark.figures

HOSTILE = """<script>alert("x")</script><img src=x onerror='y()'>&amp;{{ 7 * 7 }}$\\frac{"""
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Rows of cells per section id, all tags with attributes, and the visible text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text: dict[str, str] = {}
        self._open: list[tuple[str, str]] = []
        self._cell = False
        self.feed(html)
        self.close()
        assert not self._open, f"tags left open, a template bug: {self._open}"

    @property
    def section(self) -> str:
        return next((ident for _, ident in reversed(self._open) if ident), "")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        if tag in VOID:
            return
        keeps = tag in ("section", "details")
        self._open.append((tag, (values.get("id") or "") if keeps else ""))
        if tag == "tr":
            self.tables.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.tables[self.section][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        opened, _ = self._open.pop()
        assert opened == tag, f"<{opened}> closed by </{tag}>: text of the pool broke the markup"
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        self.text[self.section] = self.text.get(self.section, "") + data
        if self._cell:
            self.tables[self.section][-1][-1] += data


def build(folder: Path) -> tuple[str, Page]:
    url = build_report(str(folder))
    html = Path(url).read_text()
    return html, Page(html)


def columns(folder: Path, *names: str) -> list[np.ndarray]:
    table = pa.concat_tables(pq.read_table(p) for p in sorted((folder / "scores").iterdir()))
    return [np.asarray(table.column(name).to_pylist()) for name in names]


def by_first(page: Page, section: str) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in page.tables[section]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


def test_source_shares_and_enrichment_are_those_of_the_score_files(run: Path) -> None:
    source, weight = columns(run, "source", "weight")
    shown = by_first(build(run)[1], "sources")
    pool, chosen = Counter(source), Counter(source[weight > 0])
    assert set(shown) == {"Source", *pool}, "the table does not list every source once"
    for name, size in pool.items():
        in_pool, in_selection = size / len(source), chosen[name] / np.sum(weight > 0)
        expected = [
            "",
            f"{size}",
            f"{chosen[name]}",
            f"{100 * in_pool:.1f}%",
            f"{100 * in_selection:.1f}%",
            f"{in_selection / in_pool:.2f}",
        ]
        assert shown[name] == expected, (
            f"{name}: shares of the wrong rows, or of each other's total"
        )


def test_sources_beyond_the_limit_are_summed_not_dropped() -> None:
    pool = Counter({f"s{i:02d}": 10 + i for i in range(40)})
    chosen = Counter({"s00": 3, "s39": 5})
    top, other = source_table(pool, chosen, limit=30)
    assert other is not None, "ten sources vanished from the page"
    assert [row.name for row in top] == [f"s{i:02d}" for i in range(39, 9, -1)]
    assert other.pool == sum(10 + i for i in range(10)), "'other' is not the sum of the rest"
    assert other.chosen == 3, "a selected row of a small source is lost"
    shares = sum(row.pool_share for row in [*top, other])
    np.testing.assert_allclose(shares, 1.0, rtol=1e-12, err_msg="shares are not of all rows")


def test_certificate_shows_the_landmarks_own_spearman_and_r2(run: Path) -> None:
    landmarks = pq.read_table(run / "landmarks.parquet")
    shown = by_first(build(run)[1], "certificate")
    for name in ("gsm8k", "bbh", "bbh/navigate", "bbh/sorting"):
        exact, loo = (landmarks.column(f"{c}.{name}").to_numpy() for c in ("exact", "loo"))
        rho = spearmanr(exact, loo)[0]
        r2 = 1 - np.sum((exact - loo) ** 2) / np.sum((exact - exact.mean()) ** 2)
        assert shown[name][0].startswith(f"{rho:.2f} ["), f"{name}: another target's Spearman"
        assert shown[name][1] == f"{r2:.2f}", f"{name}: wrong R²"
        assert shown[name][2] == "83% [76%, 90%]", f"{name}: recall or its interval"
    order = [row[0] for row in build(run)[1].tables["certificate"]][1:]
    assert order == ["gsm8k", "bbh", "bbh/navigate", "bbh/sorting"], "groups left their target"


def test_the_page_says_how_landmarks_were_drawn(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    path = folder / "fidelity.json"
    fidelity = json.loads(path.read_text())
    for choice in ("stratified: every source in proportion", None):
        path.write_text(json.dumps({**fidelity, "landmark_choice": choice}))
        text = build(folder)[1].text["certificate"]
        assert ("How they were drawn" in text) == (choice is not None)
        assert choice is None or f"How they were drawn: {choice}." in text


def test_length_spearman_is_that_of_the_score_files(run: Path) -> None:
    text = build(run)[1].text["scores"]
    for name in ("gsm8k", "bbh"):
        tokens, score = columns(run, "n_response_tokens", f"score.{name}")
        there = np.asarray([value is not None for value in score])
        rho = spearmanr(tokens[there], score[there].astype(float))[0]
        shown = f"{rho:.2f}".replace("-", "−")
        assert re.search(rf"{name}\s+Spearman with length {shown}", text), (
            f"{name}: expected {shown}"
        )


def test_effective_numbers_against_loops(run: Path) -> None:
    (weight,) = columns(run, "weight")
    used = [w for w in weight.tolist() if w > 0]
    kish = sum(used) ** 2 / sum(w * w for w in used)
    entropy = -sum(w / sum(used) * np.log(w / sum(used)) for w in used)
    text = build(run)[1].text["weights"]
    assert f"worth {kish:.1f} equal" in text, "weights of unselected rows, or unnormalised, counted"
    assert f"and {np.exp(entropy):.1f} by their entropy" in text, "entropy in another base?"
    np.testing.assert_allclose(effective_numbers(np.ones(7)), (7, 7), rtol=1e-12)


def test_counts_reasons_and_stages(run: Path) -> None:
    page = build(run)[1]
    score, reason, weight, truncated = columns(run, "score", "reason", "weight", "truncated")
    scored = sum(value is not None for value in score)
    lead = " ".join(page.text[""].split())
    assert f"scored {scored} of {len(score)} candidates" in lead, "scored and rows are mixed up"
    assert f"selected {np.sum(weight > 0)} of them (budget 10%" in lead
    shown = by_first(page, "rows")
    for name, count in Counter(r for r in reason if r is not None).items():
        assert shown[name] == [f"{count}", f"{100 * count / len(score):.1f}%"], f"reason {name}"
    assert f"length limit: {int(truncated.astype(bool).sum())}." in page.text["rows"]
    stage = by_first(page, "stages")["embeddings"]
    assert stage[:2] == ["1 min 15 s", "75%"], "model share is model over replica seconds"
    assert stage[2:4] == ["8", "0"], "computed and reused shards are mixed up"
    assert stage[6] == f"{len(score) * 150 / 75:,.0f}", "tokens per second of wall time"
    assert by_first(page, "coverage")["norms"][1:] == ["< 0.1%", "no", "no rule for norms"]


def test_nothing_is_fetched_and_nothing_runs(run: Path) -> None:
    html, page = build(run)
    assert not re.search("https?://", html), "the page names something to fetch"
    assert "url(" not in re.sub(r"url\(#[a-z0-9]+\)", "", html), "a style fetches something"
    policy = [a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    for tag, attrs in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}, tag
        for key, value in attrs.items():
            assert not key.startswith("on"), f"an event handler: <{tag} {key}>"
            if key in {"href", "src", "xlink:href"}:
                assert (value or "").startswith(("#", "data:image/png")), f"<{tag} {key}={value}>"
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids)), "two elements share an id: a figure would use another's clip"
    figures = [a for t, a in page.tags if t == "svg"]
    assert len(figures) == 7, "2 targets x (landmarks, scores, length) and the weights"
    assert all(a.get("role") == "img" and a.get("aria-label") for a in figures), "no alt text"


def test_hostile_text_is_only_ever_text(tmp_path: Path) -> None:
    names = ("gsm8k", f"bbh/{HOSTILE}")
    folder = write_run(
        tmp_path / "run", failed=2, names=names, sources=("plain", HOSTILE), text=HOSTILE
    )
    html, page = build(folder)
    for raw in ("<script", "<img", 'alert("x")', "onerror='", "49$"):
        assert raw not in html, f"{raw!r} reached the page unescaped"
    assert HOSTILE in by_first(page, "sources"), "the source's own text is not shown as it is"
    for section in ("samples", "failed", "rows", "certificate"):
        assert HOSTILE in page.text[section], f"{section}: the text is lost or escaped twice"
    labels = [a["aria-label"] or "" for t, a in page.tags if t == "svg"]
    assert any(HOSTILE in label for label in labels), "an alt text is lost or escaped twice"


def test_text_that_utf8_cannot_carry_is_still_a_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    samples = json.loads((folder / "samples.json").read_text())
    samples["best"][0]["messages"][0]["content"] = "half a pair: \ud800 \x00 end"
    (folder / "samples.json").write_text(json.dumps(samples))
    assert "half a pair" in build(folder)[1].text["samples"], "a lone surrogate stopped the report"


def test_failed_shards_come_before_everything_else(tmp_path: Path) -> None:
    html, page = build(write_run(tmp_path, failed=2, text="boom", state="failed"))
    rows = page.tables["failed"][1:]
    assert rows[1] == ["embeddings", "pool/boom-1.parquet", "512–1,023", "4", "RuntimeError: boom"]
    assert len(rows) == 2, "not every failed shard is listed"
    assert html.index('id="failed"') < html.index('id="certificate"'), "the failure is buried"
    assert 'id="failed"' not in build(write_run(tmp_path / "good"))[0]


def test_a_failed_training_is_called_by_its_name(tmp_path: Path) -> None:
    folder = write_run(tmp_path, failed=1, text="boom", state="failed")
    manifest = json.loads((folder / "manifest.json").read_text())
    (failed,) = manifest["stages"]["embeddings"]["failed"]
    failed |= {"label": "gsm8k/rds, seed 1", "attempts": 1}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (row,) = build(folder)[1].tables["failed"][1:]
    assert row[:4] == ["embeddings", "gsm8k/rds, seed 1", "", "1"], "a file that is not at fault"


def test_an_exact_method_says_that_nothing_was_approximated(tmp_path: Path) -> None:
    page = build(write_run(tmp_path, landmarks=0, method="rds"))[1]
    assert "Nothing was approximated" in page.text["certificate"]
    assert "missing" not in page.text, "landmarks are asked of a method that has none"
    assert "certificate" not in page.tables, "a table of dashes for an exact method"


def test_a_sketch_is_not_called_exact(tmp_path: Path) -> None:
    folder = write_run(tmp_path, landmarks=0, method="exact")
    fidelity = json.loads((folder / "fidelity.json").read_text())
    fidelity["targets"] = {"gsm8k": {"landmark_halfwidth": 0.00321, "reliability": 0.93}}
    (folder / "fidelity.json").write_text(json.dumps(fidelity))
    page = build(folder)[1]
    assert "Nothing was approximated" not in page.text["certificate"], "sketch noise is hidden"
    assert by_first(page, "certificate")["gsm8k"][-2:] == ["0.00321", "0.93"]


def test_an_unfinished_run_names_what_is_missing(tmp_path: Path) -> None:
    absent = ("scores", "selection", "fidelity.json", "landmarks.parquet", "samples.json")
    page = build(write_run(tmp_path, without=(*absent, "config.yaml"), state="running"))[1]
    for name in (*absent, "config.yaml"):
        assert name in page.text["missing"], f"{name} is not named"
    assert "The run is not finished (running)" in page.text[""]
    one = build(write_run(tmp_path / "one", without=("samples.json",)))[1]
    assert "samples.json" in one.text["missing"], "one missing file is not named"
    assert "fidelity.json" not in one.text["missing"], "a file that is there is called missing"


def test_the_smallest_manifest_is_a_page(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"method": "rds"}')
    assert "RDS+" in build(tmp_path)[1].text[""]


def test_no_selection_and_no_scored_rows(tmp_path: Path) -> None:
    page = build(write_run(tmp_path / "none", selected=0))[1]
    assert by_first(page, "sources")["recipes"][-1] == "–", "an enrichment of nothing"
    folder = write_run(tmp_path / "unscored", rows=1, selected=0, landmarks=0, parts=1)
    path = folder / "scores" / "part-00000.parquet"
    table = pq.read_table(path)
    for name in ("score", "score.gsm8k", "score.bbh"):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, pa.nulls(1, pa.float64()))
    pq.write_table(table, path)
    assert "no scored rows" in build(folder)[1].text["scores"]


def test_files_of_different_runs_are_noticed(tmp_path: Path) -> None:
    folder = write_run(tmp_path, parts=4)
    (folder / "scores" / "part-00002.parquet").unlink()
    text = build(folder)[1].text["warnings"]
    assert "counts 400 rows, the score files hold 300" in text, "a lost score part goes unnoticed"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", None),
        ("manifest.json", "{}"),
        ("fidelity.json", '{"method": 3}'),
        ("samples.json", "{"),
        ("config.yaml", "a: [b"),
    ],
)
def test_bad_documents_are_named(tmp_path: Path, name: str, content: str | None) -> None:
    folder = write_run(tmp_path)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(InputError) as caught:
        build_report(str(folder))
    for part in (str(folder), name, "influence select" if name != "config.yaml" else "YAML"):
        assert part in str(caught.value), f"the message does not say {part!r}"


def test_200_000_rows_are_a_small_page(tmp_path: Path) -> None:
    names = [f"target{i}" for i in range(8)]
    sources = [f"source {i}" for i in range(500)]
    write_run(tmp_path, rows=200_000, selected=10_000, names=names, landmarks=3000, sources=sources)
    html, page = build(tmp_path)
    assert len(html) < 2_000_000, f"{len(html):,} bytes: figures grow with the number of rows"
    assert "Figures show 6 of 8 targets" in page.text["scores"], "targets left out silently"
    assert len(page.tables["sources"]) == 1 + 30 + 1, "30 sources and the others"


def test_score_columns_survive_the_parts(run: Path) -> None:
    read = read_run(str(run)).scores
    assert read is not None
    score, weight, gsm8k = columns(run, "score", "weight", "score.gsm8k")
    np.testing.assert_allclose(read.score, score.astype(float), rtol=1e-6, err_msg="order of parts")
    np.testing.assert_allclose(read.by_name["gsm8k"], gsm8k.astype(float), rtol=1e-6)
    np.testing.assert_allclose(read.weight, weight, rtol=0)


def test_names_that_are_drawn() -> None:
    assert choose_drawn(["a", "a/x", "b/y", "b/z"]) == ("a", "b/y", "b/z"), "b has no plain score"


def test_the_page_is_the_same_every_time(run: Path) -> None:
    assert build(run)[0] == build(run)[0], "two builds of one run differ: unseeded ids in figures"


def test_numbers_as_a_reader_expects_them() -> None:
    assert [seconds(s) for s in (0.456, 59.96, 3599.6, 12_000)] == [
        "0.46 s", "1 min 00 s", "1 h 00 min", "3 h 20 min",
    ]  # fmt: skip
    assert [significant(v) for v in (-0.0123456, 0.085, 512.3, None)] == [
        "−0.0123", "0.0850", "512", "–",
    ]  # fmt: skip
    assert [decimal(v) for v in (-0.784, -0.001, 27630.55)] == ["−0.78", "0.00", "27,630.55"]
    assert [percent(v) for v in (0.0512, 0.0, 1e-5)] == ["5.1%", "0.0%", "< 0.1%"]
