"""Runs in which something really goes wrong: processes of their own, files that are damaged, services that fail.

Not a test module: what the tests of faults have in common. Processes are forked from one that has imported everything,
in a second instead of eight; where a library must read its environment at its import, `tiny.python` starts them.
"""

import http.server
import json
import multiprocessing
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tiny

SECONDS = 120
PLUGIN = """\
import os, time, torch
from vit_rsst import loop

what, rank, step = os.environ.get("FAULT", "none:0:0").split(":")
train_step = loop.train_step

def faulty(s, micro_batches):
    if (os.environ.get("RANK", "0"), s.progress.global_step) == (rank, int(step)):
        if what == "nan":
            micro_batches = [(images * float("nan"), labels) for images, labels in micro_batches]
        elif what == "exit":
            os._exit(9)
        elif what == "hang":
            time.sleep(600)
        elif what == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        elif what == "overflow":
            next(s.net.parameters()).data.fill_(float("inf"))
    return train_step(s, micro_batches)

loop.train_step = faulty
"""
"""A plugin of the recipe: FAULT=what:rank:step, such as nan:1:5, goes wrong there."""

CONTEXT = multiprocessing.get_context("spawn" if tiny.ON_GPUS else "forkserver")  # CUDA does not survive a fork
IMPORTED = ["vit_rsst.cli", "vit_rsst.assembly.build", "vit_rsst.loop", "vit_rsst.evaluation.evaluate"]
CONTEXT.set_forkserver_preload([*IMPORTED, "sklearn.datasets", "torchvision.transforms"])


@dataclass(frozen=True)
class Job:
    """What one or several processes ended with."""

    codes: list[int]
    log: str

    @property
    def code(self) -> int:
        [code] = self.codes
        return code

    @property
    def last(self) -> str:
        """The last line that they printed."""
        return self.log.strip().splitlines()[-1]


def write_recipe(folder: Path, train: str = "rank_timeout: 60", steps_per_epoch: int = 3) -> Path:
    """The tiny recipe with the plugin, and with more fields in its section `train`."""
    text = tiny.RECIPE.replace("steps_per_epoch: 3", f"steps_per_epoch: {steps_per_epoch}, {train}")
    (folder / "goes_wrong.py").write_text(PLUGIN, encoding="utf-8")
    return tiny.write_recipe(folder, f"{text}plugins: [goes_wrong]\n")


def command(*argv: object, ranks: int = 1, file_bytes: int | None = None, **variables: str) -> Job:
    """Runs `vit-rsst ARGV…` in as many processes, each of which may write files of `file_bytes` at most."""
    log = Path(str(argv[1])).parent / f"log-{time.monotonic_ns()}"
    processes = start(*argv, ranks=ranks, file_bytes=file_bytes, log=log, **variables)
    return ended(processes, log)


def start(
    *argv: object,
    log: Path,
    ranks: int = 1,
    file_bytes: int | None = None,
    **variables: str,
) -> list[multiprocessing.Process]:
    """Starts `vit-rsst ARGV…` in as many processes."""
    launch = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": ranks}
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": tiny.local_rank(rank), "LOCAL_WORLD_SIZE": ranks}
        ranked = launch | place if ranks > 1 else {}
        environment = tiny.environment(
            ACCELERATE_USE_CPU="true", **{k: str(v) for k, v in (ranked | variables).items()}
        )
        arguments = ([str(item) for item in argv], environment, str(log), file_bytes)
        processes.append(CONTEXT.Process(target=_child, args=arguments))
        processes[-1].start()
    return processes


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def exit_code(function: Callable, *arguments: object) -> int:
    """Of a process that calls a function of a module; below zero when a signal ended it."""
    process = CONTEXT.Process(target=_alone, args=(function, *arguments))
    process.start()
    process.join(SECONDS)
    process.kill()
    process.join()
    return process.exitcode


def _alone(function: Callable, *arguments: object) -> None:
    import torch

    torch.set_num_threads(1)
    function(*arguments)


def ended(processes: Sequence[multiprocessing.Process], log: Path) -> Job:
    """Waits for the processes; what does not end in time is killed."""
    deadline = time.monotonic() + SECONDS
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
        if process.is_alive():
            process.kill()
            process.join()
    return Job([process.exitcode for process in processes], log.read_text(encoding="utf-8", errors="replace"))


def _child(argv: list[str], environment: dict[str, str], log: str, file_bytes: int | None) -> None:
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.path.insert(0, str(Path(argv[1]).parent))
    import torch

    from vit_rsst import cli

    torch.set_num_threads(1)
    if file_bytes is not None:  # python ignores SIGXFSZ, so that a write beyond it fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    sys.exit(cli.main(argv))


def wait_for_step(run: Path, step: int, processes: Sequence[multiprocessing.Process]) -> None:
    """Until a run has logged a step; the last line of its metrics may be half written."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        with (
            open(run / "metrics.jsonl", encoding="utf-8") if (run / "metrics.jsonl").exists() else open(os.devnull) as f
        ):
            lines = [line for line in f if line.endswith("}\n")]
        if any(json.loads(line)["step"] >= step for line in lines):
            return
        assert any(process.is_alive() for process in processes), "it ended before"
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached")


@contextmanager
def service(code: int, headers: dict[str, str] | None = None) -> Iterator[tuple[str, list[str]]]:
    """An address on this machine that answers every request with a code; and the paths asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(code)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
