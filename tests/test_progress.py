"""Progress: the arithmetic against a loop by hand; what is shown on a terminal and elsewhere."""

from __future__ import annotations

import io
import random
from typing import NamedTuple

import pytest
from rich.console import Console

from influence import progress
from influence.candidates import SourceFile
from influence.meter import WINDOW_SECONDS, Left, Meter, Work
from influence.progress import Progress, left_text
from influence.units import Unit
from influence.worker import UnitResult

FILE = SourceFile("/data/a.jsonl", "0" * 32, 4000, 4000)


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Event(NamedTuple):
    time: float
    stage: str
    held: float
    samples: int
    tokens: int


def simulated(clock: Clock, meter: Meter, seed: int, longest: float) -> list[Event]:
    """Shards of two stages at random times; what was reported, as a list."""
    draw = random.Random(seed)
    events = []
    for i in range(120):
        clock.now += draw.uniform(0, 6)
        held = draw.uniform(0.1, longest)
        stage = "gradients" if i < 50 else "embedding"
        event = Event(clock.now, stage, held, draw.randint(1, 64), draw.randint(50, 9000))
        meter.held(stage, held)
        meter.done(stage, samples=event.samples, tokens=event.tokens, planned=event.tokens)
        events.append(event)
    return events


@pytest.mark.parametrize("longest", [10.0, 80.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_speed_is_that_of_the_window(seed: int, longest: float) -> None:
    clock = Clock()
    meter = Meter({"gradients": Work(50), "embedding": Work(200)}, clock)
    begun = clock.now
    events = simulated(clock, meter, seed, longest)
    clock.now += 3
    # By hand: of all runs of the newest shards, the longest that lies in a minute, or in twice the
    # time that the slowest of them took.
    spans = [max([WINDOW_SECONDS, *(2 * e.held for e in events[-n:])]) for n in range(1, 121)]
    fits = [events[-n].time >= clock.now - spans[n - 1] for n in range(1, 121)]
    count = fits.index(False) if False in fits else len(fits)
    inside, span = events[-count:], spans[count - 1]
    assert (span > WINDOW_SECONDS) == (longest > WINDOW_SECONDS / 2), "test too weak"
    span = min(span, clock.now - begun)
    assert 0 < len(inside) < len(events), "test too weak: nothing, or all, is in the window"
    assert meter.samples_per_second() == pytest.approx(sum(e.samples for e in inside) / span)
    assert meter.tokens_per_second() == pytest.approx(sum(e.tokens for e in inside) / span)


def test_a_change_of_replicas_shows_within_a_window() -> None:
    clock = Clock()
    meter = Meter({"embedding": Work(10_000)}, clock)
    for replicas in (1, 4, 2):
        for _ in range(300):
            clock.now += 1.0 / replicas
            meter.held("embedding", 1.0)
            meter.done("embedding", samples=10, tokens=1000)
        speed = meter.tokens_per_second()
        assert speed == pytest.approx(1000 * replicas, rel=0.05), (
            f"{replicas} replicas do {1000 * replicas} tokens/s; shown {speed}: old ones count"
        )


def test_a_long_shard_says_how_fast_it_goes_while_the_next_one_takes_as_long() -> None:
    clock = Clock()
    meter = Meter({"retraining": Work(2)}, clock)
    clock.now += 400
    meter.held("retraining", 400.0)
    meter.done("retraining", samples=100, tokens=40_000)
    clock.now += 390
    assert meter.tokens_per_second() == pytest.approx(40_000 / 790), "a shard of minutes is lost"
    clock.now += 420
    assert meter.tokens_per_second() == 0.0, "a shard twice as late as the one before is a speed"


def test_nothing_finished_for_a_window_is_no_speed_at_all() -> None:
    clock = Clock()
    meter = Meter({"embedding": Work(9)}, clock)
    assert meter.tokens_per_second() is None, "a speed before the first shard"
    clock.now += 5
    meter.held("embedding", 5.0)
    meter.done("embedding", samples=1, tokens=100)
    assert meter.tokens_per_second() == pytest.approx(20.0), "the start was not counted"
    clock.now += 10 * WINDOW_SECONDS
    assert meter.tokens_per_second() == 0.0


@pytest.mark.parametrize("replicas", [1, 3])
def test_time_left_by_tokens_is_what_a_loop_over_the_missing_units_says(replicas: int) -> None:
    draw = random.Random(replicas)
    price = {"gradients": 1e-3, "embedding": 2e-5}  # replica-seconds a token
    units = {stage: [draw.randint(100, 20_000) for _ in range(40)] for stage in price}
    clock = Clock()
    meter = Meter({stage: Work(40, sum(tokens)) for stage, tokens in units.items()}, clock)
    for stage, count in (("gradients", 25), ("embedding", 7)):
        for tokens in units[stage][:count]:
            meter.held(stage, price[stage] * tokens)
            meter.done(stage, samples=1, tokens=tokens, planned=tokens)
    by_hand = sum(price["gradients"] * tokens for tokens in units["gradients"][25:])
    by_hand += sum(price["embedding"] * tokens for tokens in units["embedding"][7:])
    left = meter.left(replicas)
    assert left.not_begun == ()
    assert left.seconds == pytest.approx(by_hand / replicas)


def test_time_left_without_tokens_goes_by_shards() -> None:
    meter = Meter({"catalogue": Work(30)}, Clock())
    for _ in range(10):
        meter.held("catalogue", 2.0)
        meter.done("catalogue", samples=512, tokens=5)
    assert meter.left(4).seconds == pytest.approx(20 * 2.0 / 4)
    assert meter.left(0).seconds is None, "a time left with nobody at work"


def test_time_left_goes_on_while_long_shards_are_at_work() -> None:
    clock = Clock()
    meter = Meter({"retraining": Work(5)}, clock)
    for _ in range(2):
        meter.held("retraining", 300.0)
        meter.done("retraining")
    assert meter.left(2).seconds == pytest.approx(450.0)
    clock.now += 100.0
    assert meter.left(2).seconds == pytest.approx(350.0), "it stands still between shards"
    clock.now += 900.0
    assert meter.left(2).seconds == pytest.approx(150.0), "what no replica has yet was taken off"
    for _ in range(2):
        meter.held("retraining", 1000.0)
        meter.done("retraining")
    clock.now += 1000.0
    assert meter.left(1).seconds is None, "a time that is over was said to be left"


def test_loading_the_model_is_no_price_of_a_shard() -> None:
    meter = Meter({"embedding": Work(101, 101_000)}, Clock())
    meter.held("embedding", 42.0)
    meter.done("embedding", tokens=1000, planned=1000, set_up_seconds=40.0)
    assert meter.left(1).seconds == pytest.approx(100 * 2.0), "40 s of loading count for each shard"


def test_shards_that_somebody_else_made_or_that_failed_are_not_left() -> None:
    meter = Meter({"embedding": Work(10, 10_000)}, Clock())
    meter.held("embedding", 3.0)
    meter.done("embedding", tokens=1000, planned=1000)
    meter.held("embedding", 0.0)
    meter.done("embedding", planned=1000, computed=False)
    meter.failed("embedding", planned=1000)
    assert meter.left(1).seconds == pytest.approx(7 * 3.0), "a found or failed shard is still to do"
    assert meter.shards("embedding") == (2, 10)
    assert meter.failures == 1


def test_a_stage_that_has_not_begun_is_named_and_not_guessed() -> None:
    meter = Meter({"gradients": Work(4, 400), "embedding": Work(8, 800)}, Clock())
    assert meter.left(2) == Left(None, ("gradients", "embedding"))
    meter.held("gradients", 5.0)
    meter.done("gradients", tokens=100, planned=100)
    assert meter.left(1) == Left(pytest.approx(15.0), ("embedding",))
    assert left_text(meter.left(1)) == "15 s left, and embedding (not begun)"
    for _ in range(3):
        meter.held("gradients", 5.0)
        meter.done("gradients", tokens=100, planned=100)
    assert left_text(meter.left(1)) == "left: embedding (not begun)"


def made(stage: str, first: int, tokens: int, model: float) -> tuple[Unit, UnitResult]:
    unit = Unit(stage, "f" * 32, FILE, first, first + 3)
    return unit, UnitResult(unit.key, "created", 4, tokens, 0.0, model, "cpu")


def test_the_line_without_a_terminal_says_everything(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 30.0)
    clock = Clock()
    shown = Progress(clock=clock)
    shown.up(2, 1)
    work = [made("gradients", 4 * i, 600, 1.5) for i in range(10)]
    planned = {"gradients": {unit.key: 600 for unit, _ in work}}
    with shown.working({"gradients": 10, "embedding": 3}, 5, planned):
        for unit, result in work[:4]:
            clock.now += 5.0
            shown.held("gradients", 10.0)
            shown.advance(unit, result)
        shown.retried()
        shown.failed(work[4][0], "OSError: gone")
        assert "samples/s" not in capsys.readouterr().err, "a line before it is due"
        clock.now += 11.0
        shown.tick()
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "samples/s" in x]
    # 16 rows and 2,400 tokens in 31 s; 5 shards left at 10 replica-seconds each, on 2 replicas.
    assert line == (
        "gradients 400 tokens/s a replica, 4/10 shards; embedding 0/3 shards; "
        "0.5 samples/s, 77 tokens/s; 2 replica(s) up, 1 awaited; 1 tried again; 1 failed; "
        "15 s left, and embedding (not begun)"
    )


def test_on_a_terminal_the_same_stands_under_the_bars() -> None:
    clock = Clock()
    console = Console(file=io.StringIO(), force_terminal=True, width=140, color_system=None)
    shown = Progress(console=console, clock=clock)
    shown.up(3, 0)
    work = [made("embedding", 4 * i, 1000, 0.5) for i in range(4)]
    with shown.working({"embedding": 4}, 0):
        for unit, result in work[:3]:
            clock.now += 2.0
            shown.held("embedding", 6.0)
            shown.advance(unit, result)
        shown.note("a line that stays")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in (
        "3/4 shards",
        "2,000 tokens/s a replica",
        "2.0 samples/s, 500 tokens/s",
        "3 replica(s)",
        "0 failed",
        "2 s left",
        "6 s so far",
        "a line that stays",
    ):
        assert part in text, f"the display lacks {part!r}:\n{text}"


def test_nothing_is_drawn_where_it_is_to_be_quiet() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, quiet=True)
    shown = Progress(quiet=True, console=console)
    with shown.working({"embedding": 1}, 0):
        shown.advance(*made("embedding", 0, 10, 0.1))
    assert not console.file.getvalue()  # type: ignore[attr-defined]
