"""What an evaluation is made of, and how its result is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from influence.config import Config
from influence.job import Job

if TYPE_CHECKING:
    from influence.plots import Plot


@dataclass(frozen=True)
class ResultTable:
    """A result as a table; the first column names the rows, the others hold numbers.

    further: tables of the same result, to be shown below it.
    """

    title: str
    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    further: Sequence[ResultTable] = ()


class Trainings(NamedTuple):
    """So many trainings on so many rows each; without rows the model is tested as it is."""

    count: int
    rows: float


def no_trainings(config: Config, counts: Mapping[str, Any]) -> Sequence[Trainings]:
    """What an evaluation trains unless it says otherwise: nothing."""
    return ()


def no_plots(document: dict[str, Any]) -> Sequence[Plot]:
    """What an evaluation shows beside its table unless it says otherwise: nothing."""
    return ()


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: a run of its own below RUN/evaluations, over the run's cache.

    Attributes:
        settings: what its run is of, out of the user's config: whatever it leaves out takes the
            defaults, and changing that does not stand in the way of going on.
        inputs: reads what it needs of the files beside the rows' text, by those settings; raises
            InputError before anything is recorded or trained.
        reducer: makes what holds the run's arrays, like `influence.reducer.Reducer`.
        run: takes the job, that reducer and the inputs; returns the document for evaluation.json.
        table: that document as it is shown; raises pydantic's ValidationError if it is none.
        plots: figures of the same document for the report, below the table; each one's `alt` is
            its caption. `influence.plots.drawn` makes one. Import it where it is called: it brings
            matplotlib along, which the replicas do without.
        trainings: what its run trains, by those settings and the pool's counts, before anything is
            drawn; its inputs are `influence.retraining.Tested` by target then.
        as_written: its settings are of the config as it is written, and not of the model that the
            run's warm-up made: it makes select runs of its own, which have theirs.
    """

    settings: Callable[[Config], Config]
    inputs: Callable[[Config], Any]
    reducer: Callable[[Config], Any]
    run: Callable[[Job, Any, Any], dict[str, Any]]
    table: Callable[[dict[str, Any]], ResultTable]
    plots: Callable[[dict[str, Any]], Sequence[Plot]] = no_plots
    trainings: Callable[[Config, Mapping[str, Any]], Sequence[Trainings]] = no_trainings
    as_written: bool = False
