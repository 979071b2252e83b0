"""Signs of life of every rank, in the launcher's store: a rank that is gone or hangs is named, and all ranks end.

A collective cannot do this. NCCL ends the process after its timeout without raising; gloo reports a closed connection,
or nothing while the other process is merely stopped. Each rank therefore beats in the store, over a connection of its
own, from a thread that runs while the main thread is blocked in C. Rank 0 watches all ranks, the others watch rank 0.

- Killed, stopped (SIGSTOP), machine lost, or the GIL held for ever: the beats stop. Watched from the start.
- Main thread blocked in a call that holds no lock: the rank beats and says how long it has not moved. Watched from its
  first full step, so that compilation, the first batch and a resume that reads far do not count.
- The GIL held for ever in this process: no thread below runs, but faulthandler's, which needs none, writes the stacks.
- The store's host (the launcher, or rank 0 without one) killed or stopped: a second thread notices that the first,
  which talks to the store, gets no answer.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

from torch import distributed

from vit_rsst.errors import MissingRequirement

GRACE = 5.0
"""Seconds for the main thread's own error, which may know more, once another rank has ended."""
LEAVING = 5.0
"""Seconds to record the reason before the process ends; the disk may be what hangs."""
MEETINGS = 50
"""Times that a rank looks for the first beats of the others, ten in an interval."""
VERDICT = "verdict"

WAITING_FILE = os.path.join("torch", "distributed", "distributed_c10d.py")
WAITING_CALLS = {"_distributed_broadcast_coalesced", "_sync_buffers", "_sync_module_states"}
"""Where a main thread that waits for other ranks stands; a backward pass that waits for them cannot be told apart."""


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself.

    Attributes:
        count: beats so far.
        place: places entered so far; ranks in lockstep have equal numbers.
        still: seconds since the main thread last moved; 0 before its first full step and in work that may take long.
        waits: whether the main thread is in a collective.
        ended: empty while it runs, then how it ended.
        exit_code: with which it ended; None while it runs.
    """

    rank: int
    host: str
    pid: int
    count: int = 0
    place: int = 0
    doing: str = "starting"
    step: int = 0
    still: float = 0.0
    waits: bool = False
    ended: str = ""
    exit_code: int | None = None

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.pid})"


def verdict(beats: Sequence[Beat], silent: Mapping[int, float], limit: float) -> str:
    """The sentence that names the ranks that are lost; empty while there are none.

    Args:
        beats: the last of each rank heard so far.
        silent: rank → seconds since its last beat arrived.
        limit: seconds that a rank may be silent or still.
    """
    running = [beat for beat in beats if beat.exit_code is None]
    if failed := [beat for beat in beats if beat.exit_code and silent[beat.rank] > GRACE]:
        return "; ".join(f"{beat} ended: {beat.ended}" for beat in failed)
    if gone := [beat for beat in running if silent[beat.rank] > limit]:
        return "; ".join(
            f"{beat} has shown no sign of life for {silent[beat.rank]:.0f} s ({beat.doing}, step {beat.step}): it was "
            "killed or stopped, or its machine is lost"
            for beat in gone
        )
    # All ranks wait for the one that is furthest behind, so theirs is the hang that counts.
    behind = [beat for beat in running if beat.place == min(b.place for b in running)]
    hanging = [beat for beat in behind if not beat.waits] or behind
    return "; ".join(
        f"{beat} has not moved for {beat.still:.0f} s ({beat.doing}, step {beat.step})"
        for beat in hanging
        if beat.still > limit
    )


class Heartbeat:
    """Beats for this rank and ends it when another rank, or this one, is lost.

    Args:
        rank: of this process.
        world: number of processes; alone, a hang only leaves its stacks.
        limit: seconds that a rank may be silent or still.
        stacks: file for the stacks of all threads; empty as long as all is well.
        connect: opens a connection to the store; called by the thread that uses it.
        on_loss: records the sentence that names who is lost; called once, before the process ends.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        limit: float,
        stacks: Path,
        connect: Callable[[], "distributed.Store"],
        on_loss: Callable[[str], None],
    ):
        self.limit, self.stacks = limit, stacks
        self._world, self._connect, self._on_loss = world, connect, on_loss
        self._beat = Beat(rank, socket.gethostname(), os.getpid())
        self._interval = min(2.0, limit / 10)
        self._main = threading.main_thread().ident
        self._place, self._step, self._doing = 0, 0, "starting"
        self._moved = self._answered = time.monotonic()
        self._is_armed, self._may_take_long = False, 0
        self._ended: tuple[str, int | None] = ("", None)
        self._closing, self._has_met = threading.Event(), threading.Event()
        self._watched: Sequence[int] = range(world) if rank == 0 else [0]
        # A rank that never beats is as lost as one that stops.
        unheard = (Beat(number, "a machine not heard of", 0, count=-1) for number in self._watched)
        self._heard: dict[int, tuple[Beat, float]] = {beat.rank: (beat, time.monotonic()) for beat in unheard}
        self._verdict, self._broken = "", ""
        self._file: TextIO | None = None
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._exchange, self._watch)]

    def start(self) -> "Heartbeat":
        for thread in self._threads:
            thread.start()
        if self._world > 1:
            self._has_met.wait(MEETINGS * self._interval / 10)
        return self

    # -- the main thread says where it is

    def enter(self, doing: str) -> None:
        """Says that the main thread enters a place that all ranks enter in the same order."""
        self._place, self._doing, self._moved = self._place + 1, doing, time.monotonic()

    def move(self) -> None:
        """Says that the main thread moves within its place."""
        self._moved = time.monotonic()

    def step_done(self, step: int) -> None:
        """Says that an optimizer step is done; from the first one on, a rank that does not move is lost."""
        self._step, self._moved = step, time.monotonic()
        if not self._is_armed:
            self._is_armed = True
            with suppress(OSError):
                self._file = self.stacks.open("w", encoding="utf-8")
            self._rearm()  # the thread that does so from now on may be late

    @contextmanager
    def long_work(self, doing: str) -> Iterator[None]:
        """Work that may take any time as long as the process lives, such as writing to a slow disk."""
        self.enter(doing)
        self._may_take_long += 1
        try:
            yield
        finally:
            self._may_take_long -= 1
            self.enter("training")

    def close(self, ended: str = "finished", exit_code: int = 0) -> None:
        """Ends the threads; the last beat tells the others how this rank ended."""
        self._ended = ended, exit_code
        self._closing.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(LEAVING)
        faulthandler.cancel_dump_traceback_later()
        if self._file is not None:
            self._file.close()
            self._file = None

    def missing(self) -> tuple[str, int | None]:
        """Names the ranks that have ended or whose beats stop, empty when all still beat after some seconds.

        Returns:
            The sentence, and the exit code of the first rank that ended by itself.
        """
        self._watched = range(self._world)
        silence, began = 3 * self._interval, time.monotonic()
        while self._world > 1 and time.monotonic() < began + GRACE + 2 * silence:
            time.sleep(self._interval / 2)
            now, others = time.monotonic(), [item for item in self._heard.items() if item[0] != self._beat.rank]
            if ended := [beat for _, (beat, _) in others if beat.exit_code]:
                return "; ".join(f"{beat} ended: {beat.ended}" for beat in ended), ended[0].exit_code
            if self._broken:
                return f"{self._store_host(self._heard)} is gone", None
            if gone := [beat for _, (beat, since) in others if now - max(since, began) > silence]:
                return "; ".join(f"{beat} is gone" for beat in gone), None
        return "", None

    # -- the threads

    def _exchange(self) -> None:
        """Writes this rank's beat and reads those it watches; blocks when the store's host does."""
        if self._world == 1:
            while not self._closing.wait(self._interval):
                self._rearm()
            return
        try:
            store, is_last = self._connect(), False
            self._meet(store)
            while not is_last:
                is_last = self._closing.wait(self._interval)
                self._rearm()
                self._write(store)
                self._read(store)
                if self._verdict and self._beat.rank == 0:
                    store.set(VERDICT, self._verdict)
                elif store.check([VERDICT]):
                    self._verdict = store.get(VERDICT).decode()
                self._answered = time.monotonic()
        except (distributed.DistError, RuntimeError) as error:
            self._broken = str(error).strip().splitlines()[0]
        finally:
            self._has_met.set()

    def _meet(self, store: "distributed.Store") -> None:
        """Hears of every watched rank before training begins: whoever dies soon is named with its host."""
        for _ in range(MEETINGS):
            self._write(store)
            self._read(store)
            if all(self._heard[rank][0].count >= 0 for rank in self._watched):
                break
            self._closing.wait(self._interval / 10)
        self._answered = time.monotonic()
        self._has_met.set()

    def _write(self, store: "distributed.Store") -> None:
        self._beat = Beat(
            self._beat.rank, self._beat.host, self._beat.pid, self._beat.count + 1, self._place, self._doing,
            self._step, round(self._still, 1), is_waiting(sys._current_frames().get(self._main)), *self._ended,
        )  # fmt: skip
        store.set(f"beat/{self._beat.rank}", json.dumps(asdict(self._beat)))

    def _read(self, store: "distributed.Store") -> None:
        """Notes when the count of each watched rank last changed."""
        keys = [f"beat/{rank}" for rank in self._watched]
        if not store.check(keys):
            keys = [key for key in keys if store.check([key])]
        for content in store.multi_get(keys) if keys else []:
            beat = Beat(**json.loads(content))
            if (
                beat.rank not in self._heard or self._heard[beat.rank][0].count != beat.count
            ):  # all are read by `missing`
                self._heard[beat.rank] = beat, time.monotonic()

    @property
    def _still(self) -> float:
        return time.monotonic() - self._moved if self._is_armed and not self._may_take_long else 0.0

    def _rearm(self) -> None:
        """Lets faulthandler's thread write the stacks, should this one not come back because the GIL is held."""
        if self._file is not None and not self._closing.is_set():
            left = self.limit - 2 * self._interval - self._still  # before the others end this process
            faulthandler.dump_traceback_later(max(left, 0.1), file=self._file)

    def _watch(self) -> None:
        """Ends the process once somebody is lost."""
        last = time.monotonic()
        while not self._closing.wait(self._interval / 2):
            now = time.monotonic()
            if now - last > max(5 * self._interval, 5.0):  # this process was suspended, and others may have been
                self._forgive(now - last)
            last = now
            found = self._verdict or self._found(now)
            if found and self._world > 1 and not self._closing.is_set():
                self.end(found)

    def _forgive(self, seconds: float) -> None:
        self._moved, self._answered = self._moved + seconds, self._answered + seconds
        self._heard = {rank: (beat, since + seconds) for rank, (beat, since) in self._heard.items()}

    def _found(self, now: float) -> str:
        heard = dict(self._heard)
        silent = {rank: now - since for rank, (_, since) in heard.items()}
        beats = [beat for beat, _ in heard.values()]
        if self._beat.rank:  # who is furthest behind only rank 0 sees; that rank 0 is gone only the others
            beats = [replace(beat, still=0.0) for beat in beats]
        if found := verdict(beats, silent, self.limit):
            return found
        silence = now - self._answered
        if self._broken and silence > GRACE and heard[0][0].exit_code is None:
            return f"{self._store_host(heard)} is gone ({self._broken})"
        return f"{self._store_host(heard)} has not answered for {silence:.0f} s" if silence > self.limit else ""

    def _store_host(self, heard: Mapping[int, tuple[Beat, float]]) -> str:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return f"the launcher that serves the ranks' store at {address}"
        return f"{heard[0][0]}, which serves the ranks' store,"

    def end(self, found: str) -> NoReturn:
        """Tells the others, writes the stacks, records the reason and ends the process."""
        self._verdict = found
        with suppress(OSError), self.stacks.open("a", encoding="utf-8") as file:
            faulthandler.dump_traceback(file)
        recording = threading.Thread(target=self._on_loss, args=(found,), daemon=True)
        recording.start()
        recording.join(LEAVING)
        if self._beat.rank == 0:  # the others hear of it before this process, which may serve the store, is gone
            self._closing.wait(2 * self._interval)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(MissingRequirement.exit_code)


def is_waiting(frame: FrameType | None) -> bool:
    """Whether a thread is in a collective."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.endswith(WAITING_FILE) or code.co_name in WAITING_CALLS:
            return True
        frame = frame.f_back
    return False
