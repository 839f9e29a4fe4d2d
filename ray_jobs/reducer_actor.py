"""The reducer actor, which holds the run's arrays, and what stands for it in the driver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from influence.config import Config
from influence.errors import ReducerLostError
from influence.reducer import Reducer
from ray_jobs.task_errors import cause_of, text_of

_WAIT_SECONDS = 1.0


@ray.remote(max_restarts=0)
class ReducerActor:
    """Holds the run's arrays; see `influence.reducer.Reducer`."""

    def __init__(self, config: dict[str, Any], build: Callable[[Config], Any]) -> None:
        self.reducer = build(Config.model_validate(config))

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the reducer."""
        return getattr(self.reducer, method)(*arguments)


class RemoteReducer:
    """A reducer in an actor, with the methods of `Reducer`; its errors arrive as they were.

    It lives on the driver's node, which the job depends on anyway: a node that the cluster gives
    back takes replicas along, which can be replaced, but never the run's arrays.

    Args:
        config: the run's.
        on_wait: called about once a second while the reducer is at work.
        build: makes the reducer, in the actor.

    Raises:
        ReducerLostError: by every method, once the actor is lost.
    """

    def __init__(
        self,
        config: Config,
        on_wait: Callable[[], None] = lambda: None,
        build: Callable[[Config], Any] = Reducer,
    ) -> None:
        node = ray.get_runtime_context().get_node_id()
        # No CPU is reserved: the reducer works when the replicas have nothing to do.
        actor = ReducerActor.options(  # pyright: ignore[reportAttributeAccessIssue]
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        )
        self._actor = actor.remote(config.model_dump(mode="json"), build)
        self._on_wait = on_wait

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)

        def call(*arguments: Any) -> Any:
            answer = self._actor.call.remote(method, *arguments)
            try:
                while not ray.wait([answer], timeout=_WAIT_SECONDS)[0]:
                    self._on_wait()
                return ray.get(answer)
            except RayTaskError as error:
                raise cause_of(error) from error
            except RayError as error:
                raise ReducerLostError(
                    f"the reducer was lost ({text_of(error)}); if it ran out of memory, use a "
                    "larger machine for the driver. Everything that was committed stands: the same "
                    "command goes on from there"
                ) from error

        return call
