"""Who decodes: worker processes that live as long as the loader, or this process.

Workers read and decode their parts of each batch straight into a ring of batches in shared memory, in the order of the
batches and as far ahead as the ring is long; a thread of the training process notes when a batch is whole. The training
thread takes finished batches and does nothing for each image. Without workers a thread reads ahead, and the training
thread decodes: timm's and torchvision's augmentations draw from generators of the process, which the model shares.
"""

import importlib
import mmap
import os
import queue
import random
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import DupFd
from multiprocessing.util import Finalize

import numpy as np
import psutil
import torch

from vit_rsst.data.decoding import Decoded, Decoder
from vit_rsst.data.feeds import Feed, Part
from vit_rsst.data.streams import Stream
from vit_rsst.data.tables import Rows
from vit_rsst.errors import MissingRequirement, RunError

IMPORTS = ["vit_rsst.data.deaf", "vit_rsst.data.workers", "torchvision.transforms", "datasets", "pyarrow.parquet"]
"""Imported once, by the process that all workers of the run are forked from; a worker then starts in 40 ms."""

HELD = 2
"""Batches that the caller still has: the one it works with, and the next one on its way to the device."""

RING_BYTES = 256 * 2**20


class Ring:
    """Batches in shared memory: images uint8 (length, batch, 3, size, size), labels int64 (length, batch).

    An anonymous file, since /dev/shm is small in many containers.
    """

    def __init__(self, length: int, batch: int, size: int):
        self._shape = (length, batch, size)
        if hasattr(os, "memfd_create"):
            self._file = os.memfd_create("vit_rsst")
        else:
            with tempfile.TemporaryFile() as file:
                self._file = os.dup(file.fileno())
        os.ftruncate(self._file, length * batch * (3 * size**2 + 9))
        self._map()

    def __len__(self) -> int:
        return self._shape[0]

    def _map(self) -> None:
        self._is_pinned = False
        length, batch, size = self._shape
        count, pixels = length * batch, length * batch * 3 * size**2
        self.memory = mmap.mmap(self._file, count * (3 * size**2 + 9))
        self.labels = torch.frombuffer(self.memory, dtype=torch.int64, count=count).view(length, batch)
        self.kept = torch.frombuffer(self.memory, dtype=torch.bool, count=count, offset=8 * count).view(length, batch)
        images = torch.frombuffer(self.memory, dtype=torch.uint8, count=pixels, offset=9 * count)
        self.images = images.view(length, batch, 3, size, size)

    def __getstate__(self) -> tuple:
        return self._shape, DupFd(self._file)

    def __setstate__(self, state: tuple) -> None:
        self._shape, file = state
        self._file = file.detach()
        self._map()

    def pin_(self) -> None:
        """Locks the memory, so that a GPU copies from it without waiting."""
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self.labels.data_ptr(), len(self.memory), 0))
        self._is_pinned = True

    def write_(self, number: int, part: Part, decoded: Decoded) -> None:
        slot, positions = number % len(self), torch.tensor(part.positions, dtype=torch.int64)
        self.kept[slot, positions] = False
        kept = positions[decoded.kept]
        self.images[slot, kept], self.labels[slot, kept], self.kept[slot, kept] = decoded.images, decoded.labels, True

    def read(self, number: int, size: int, problems: list[str]) -> Decoded:
        """A batch, in place unless something is missing in it."""
        slot = number % len(self)
        images, labels = self.images[slot, :size], self.labels[slot, :size]
        if not problems:
            return Decoded(images, labels, torch.arange(size), problems)
        kept = self.kept[slot, :size].nonzero().flatten()
        return Decoded(images[kept], labels[kept], kept, problems)

    def close(self) -> None:
        if self._is_pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self.labels.data_ptr()))
            self._is_pinned = False
        os.close(self._file)


class Pool:
    """Worker processes that hold a source and decode feeds of it, one after the other."""

    def __init__(
        self,
        source: Rows | Stream,
        decoder: Decoder,
        workers: int,
        batch: int,
        pin_memory: bool = False,
        ahead: int = 256,
    ):
        """Starts the workers.

        Args:
            batch: images of the largest batch.
            pin_memory: lock the ring, for copies to a GPU.
            ahead: images that are decoded before they are needed, where 256 MB hold so many.
        """
        from torch.multiprocessing import get_context

        # A fork of this process would take its threads' locks along, and a GPU's state.
        context = get_context("forkserver")
        context.set_forkserver_preload(IMPORTS)
        fitting = RING_BYTES // (batch * 3 * decoder.size**2)
        self._ring = Ring(HELD + max(2, min(-(-ahead // batch), fitting)), batch, decoder.size)
        if pin_memory:
            self._ring.pin_()
        self._credits, self._pipes, self._processes = [], [], []
        self._granted = 0  # batches that every worker may write, less those that it has
        self._collector: threading.Thread | None = None
        for worker in range(workers):
            ours, theirs = context.Pipe()
            credits = context.Semaphore(0)
            arguments = (source, decoder, worker, workers, self._ring, credits, theirs, os.getpid())
            process = context.Process(target=work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._credits.append(credits)
            self._pipes.append(ours)
            self._processes.append(process)
        # Else multiprocessing would ask them by SIGTERM, to which they are deaf, and wait.
        Finalize(self, _kill, args=(self._processes,), exitpriority=1)

    @property
    def is_open(self) -> bool:
        return bool(self._processes)

    def run(self, feed: Feed) -> Iterator[Decoded]:
        """The batches of a feed, in order; each stays in the ring until the second one after it is asked for.

        Given up before its end, it ends the workers.

        Raises:
            RunError: what a worker came upon.
            MissingRequirement: a worker has died.
        """
        for pipe in self._pipes:
            pipe.send(feed)
        self._grant(len(self._ring) - self._granted)
        whole: queue.SimpleQueue = queue.SimpleQueue()
        self._collector = threading.Thread(target=self._collect, args=(feed, whole), daemon=True)
        self._collector.start()
        has_ended = False
        try:
            for number in range(len(feed)):
                found = whole.get()
                if isinstance(found, BaseException):
                    raise found
                yield self._ring.read(number, feed.size(number), found)
                if number >= HELD - 1:
                    self._grant(1)
            self._granted -= len(feed)
            has_ended = True
        finally:
            if not has_ended:
                self.close()

    def _grant(self, batches: int) -> None:
        self._granted += batches
        for credits in self._credits:
            for _ in range(batches):
                credits.release()

    def _collect(self, feed: Feed, whole: queue.SimpleQueue) -> None:
        """Puts the problems of each batch into the queue once every worker has passed it; or an exception, at last."""
        done = dict.fromkeys(self._pipes, 0)
        problems: list[list[str]] = [[] for _ in range(len(self._ring))]
        ends = {process.sentinel: process for process in self._processes}
        number = 0
        while number < len(feed):
            for ready in wait([*self._pipes, *ends]):
                try:
                    found = self._death(ends[ready]) if ready in ends else ready.recv()
                except (EOFError, OSError):
                    found = self._death(self._processes[self._pipes.index(ready)])
                if isinstance(found, BaseException):
                    whole.put(found)
                    return
                problems[done[ready] % len(self._ring)] += found
                done[ready] += 1
            while number < min(done.values()):
                slot = number % len(self._ring)
                whole.put(problems[slot])
                problems[slot] = []
                number += 1

    def _death(self, process: object) -> Exception:
        process.join(1.0)
        return MissingRequirement(
            f"data.workers: worker process {process.pid} died with exit code {process.exitcode} (−9 often means out of "
            "memory: lower data.workers or data.shuffle_buffer); run the same command to resume."
        )

    def close(self) -> None:
        """Ends the workers."""
        if not self._processes:
            return
        _kill(self._processes)
        if self._collector is not None:
            self._collector.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes = []
        self._ring.close()


def _kill(processes: list) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


class Here:
    """Decodes feeds in this process, as a `Pool` does in others."""

    is_open = True

    def __init__(self, source: Rows | Stream, decoder: Decoder, pin_memory: bool = False):
        self._source, self._decoder, self._pin_memory = source, decoder, pin_memory

    def run(self, feed: Feed) -> Iterator[Decoded]:
        """The batches of a feed, in order.

        Raises:
            RunError: the source cannot be read.
        """
        parts = feed.parts(self._source, 0, 1)
        try:
            for part in parts:
                with generators_kept() if self._decoder.is_random else nullcontext():
                    decoded = self._decoder.__getitems__(part.samples)
                if self._pin_memory:
                    images, labels = decoded.images.pin_memory(), decoded.labels.pin_memory()
                    decoded = decoded._replace(images=images, labels=labels)
                yield decoded
        finally:
            parts.close()

    def close(self) -> None:
        """Nothing is left to end."""


@contextmanager
def generators_kept() -> Iterator[None]:
    """Gives the generators of the process back as they were: a step's dropout must not depend on who decodes."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)


def work(
    source: Rows | Stream, decoder: Decoder, worker: int, workers: int, ring: Ring, credits: object, pipe: Connection,
    run: int,
) -> None:  # fmt: skip
    """The life of a worker: feed after feed, each batch when the ring has room for it."""
    end_with(run)
    torch.set_num_threads(1)
    while True:
        try:
            feed = pipe.recv()
        except EOFError:
            return
        try:
            for number, part in enumerate(feed.parts(source, worker, workers)):
                credits.acquire()
                problems = []
                if part.samples:
                    decoded = decoder.__getitems__(part.samples)
                    ring.write_(number, part, decoded)
                    problems = decoded.problems
                pipe.send(problems)
        except RunError as error:
            pipe.send(error)
        except Exception:  # it is raised in the process of the run
            pipe.send(RuntimeError(f"a worker failed:\n{traceback.format_exc()}"))


def end_with(run: int) -> None:
    """Lets a worker end once the process of the run is gone, be it killed: its parent is the fork server."""

    def watch() -> None:
        while psutil.pid_exists(run):
            time.sleep(1.0)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    importlib.import_module("vit_rsst.data.deaf").outlive_terms()  # its import makes this process deaf
