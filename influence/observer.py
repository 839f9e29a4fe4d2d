"""Who wants to know what happens to a run's bundles: metrics of a cluster, and the like."""

from __future__ import annotations

from typing import Any, Protocol


class Observer(Protocol):
    """Is told, on the driver's one thread, what happens to bundles of units.

    A bundle that is answered is first `held`, for its last attempt, and then `done`.
    """

    def replicas(self, up: int, awaited: int) -> None:
        """So many replicas are up, and so many are demanded but not up."""
        ...

    def held(self, bundle: Any, seconds: float) -> None:
        """A replica was up and had this bundle as the first of its work for so long.

        The time of a replica with work is divided among its bundles without gap or overlap:
        reading, tokenising, the model, writing, waiting for the driver, and attempts that fail.
        """
        ...

    def retried(self, bundle: Any) -> None:
        """An attempt ended without an answer, and another one follows."""
        ...

    def done(self, bundle: Any, results: Any) -> None:
        """Every unit of the bundle is committed; `results` has one entry for each."""
        ...

    def failed(self, bundle: Any, attempts: int, error: str) -> None:
        """The bundle failed for good."""
        ...


class Silent:
    """An observer that does nothing."""

    def replicas(self, up: int, awaited: int) -> None:
        """See `Observer`."""

    def held(self, bundle: Any, seconds: float) -> None:
        """See `Observer`."""

    def retried(self, bundle: Any) -> None:
        """See `Observer`."""

    def done(self, bundle: Any, results: Any) -> None:
        """See `Observer`."""

    def failed(self, bundle: Any, attempts: int, error: str) -> None:
        """See `Observer`."""
