"""What ranks tell each other beside collectives: rank 0 looks or works alone, and the others poll for the result.

A rank that polls holds no collective open, so nothing times out however slow the disk is.
"""

import datetime
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState
from torch import distributed

from vit_rsst import errors
from vit_rsst.errors import RunError
from vit_rsst.run.heartbeat import GRACE, Heartbeat

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.005, 0.5
"""Seconds between two looks at the store."""


@dataclass
class Ranks:
    """The processes of a run.

    Attributes:
        rank: of this process.
        world: how many there are.
        heartbeat: of this process.
    """

    rank: int
    world: int
    heartbeat: Heartbeat
    _store: "distributed.Store | None" = None
    _calls: int = field(default=0, repr=False)

    @classmethod
    def join(cls, limit: float, stacks: Path, on_loss: Callable[[str], None]) -> "Ranks":
        """Connects to the store and starts the heartbeat.

        Args:
            limit: seconds that a rank may be silent or still.
            stacks: folder of the files for stacks.
            on_loss: see `Heartbeat`.
        """
        state = PartialState()
        rank, world = state.process_index, state.num_processes
        file = stacks / f"stacks-{rank}.txt"
        heartbeat = Heartbeat(rank, world, limit, file, lambda: connection(limit), on_loss).start()
        return cls(rank, world, heartbeat, connection(limit) if world > 1 else None)

    def on_main(self, doing: str, work: Callable[[], T]) -> T:
        """The result of `work`, done by rank 0 alone, on every rank; collective.

        Args:
            doing: what rank 0 does meanwhile, such as `writing the last resume point`.
            work: its result is plain JSON data.

        Raises:
            RunError: `work` failed on rank 0, which raises its own error.
        """
        self._calls += 1
        key = f"main/{self._calls}"
        with self.heartbeat.long_work(doing if self.rank == 0 else f"waiting for rank 0: {doing}"):
            if self.rank:
                return self._told(key)
            try:
                result = work()
            except BaseException as error:
                self._tell(key, {"error": type(error).__name__, "text": str(error)})
                self._wait(lambda: self._store is None or self._store.add(f"{key}/read", 0) == self.world - 1, GRACE)
                raise  # once the others know: this process may serve the store
            self._tell(key, {"result": result})
            return result

    def _tell(self, key: str, content: dict) -> None:
        if self._store is not None:
            self._store.set(key, json.dumps(content))

    def _told(self, key: str) -> object:
        self._wait(lambda: self._store.check([key]))
        content = json.loads(self._store.get(key))
        if "error" not in content:
            return content["result"]
        self._store.add(f"{key}/read", 1)
        kind = getattr(errors, content["error"], RunError)
        raise kind(content["text"] if kind is not RunError else f"rank 0 failed: {content['error']} {content['text']}")

    def _wait(self, is_so: Callable[[], bool], seconds: float = math.inf) -> None:
        pause, began = FIRST_PAUSE, time.monotonic()
        while not is_so() and time.monotonic() - began < seconds:
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE)


def connection(limit: float) -> "distributed.Store":
    """A connection of its own to the store that the launcher or rank 0 serves; no other thread can hold it up."""
    store = distributed.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=datetime.timedelta(seconds=max(limit, 10.0)),
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return distributed.PrefixStore(f"vit_rsst/{attempt}", store)


def meeting_place(limit: datetime.timedelta) -> dict:
    """Arguments of `init_process_group` for a job that its launcher has started again.

    The launcher's store outlives an attempt, and torch looks in it for the addresses of the other ranks: without keys
    of its own, an attempt may find those of the one before.
    """
    is_again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if not is_again or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    store = distributed.PrefixStore("group", connection(limit.total_seconds()))
    return {"store": store, "rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}


@contextmanager
def once_a_node(state: PartialState) -> Iterator[None]:
    """Rank 0 enters first, then the first rank of each node, then the others: caches may be shared or not."""
    with state.main_process_first(), state.local_main_process_first():
        yield
