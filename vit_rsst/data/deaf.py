"""Imported by the fork server of the workers, which then ignore the signals that ask a run to stop.

SLURM sends a signal to every process of a job step. Workers that died of it would end the run before its resume point;
they end with the process of the run (`workers.end_with`), and SIGTERM, with which Python ends a process that it has
started, ends them after a while.
"""

import signal

TERM_SECONDS = 60
"""How long a worker outlives SIGTERM: enough for a run that stops cleanly to finish its step."""

signal.signal(signal.SIGUSR1, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the server ends when its last client has


def outlive_terms() -> None:
    """Called in a worker, which inherits that SIGTERM is ignored: lets it end the process, later."""
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(TERM_SECONDS))
