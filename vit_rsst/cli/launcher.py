"""\
usage: launch_experiment.sh DATASET MODEL EPOCHS REG EXP PRETRAINED RATE AUTO ALGORITHM [FILLBACK]
                            [--yes] [--dry-run] [--restart] [--OLD-NAME VALUE ...] [KEY=VALUE ...]

Starts an experiment from the arguments of the original RSST program, and prints the recipe and overrides they become.

  DATASET     cifar10 | cifar100 | imagenet
  MODEL       CIFAR: vit_tiny | vit_small | vit_base | resnet20 (old: res20s)
              ImageNet: vit_small_imagenet | vit_base_imagenet | vit_large_imagenet
  EPOCHS      epochs per round, 1 to 99999
  REG         penalty strength, above 0 and at most 1000; 1 shrinks the condemned to a thousandth
  EXP         exponent of the penalty's ramp, above 0 and at most 100
  PRETRAINED  true | false
  RATE        share of the remaining weights that each of the 20 rounds removes, above 0 and below 1
  AUTO        y: start at once | n: print the plan and ask
  ALGORITHM   rsst | refill | dense | imp | rst | gmp | constant
  FILLBACK    refill: share of the removed units to put back, 0 or more and below 1

  --yes       start without asking, whatever AUTO is
  --dry-run   print the plan and stop; nothing is created
  --restart, --allow-world-size-change, --allow-data-change: see vit-rsst train --help
  --OLD-NAME  one of the names below
  KEY=VALUE   any field of recipes/reference.yaml; takes precedence over everything else

The run is named after the positionals, --seed and --criteria; runs that differ in anything else need an --exp_name.
To try it out with a few images instead of ImageNet:
  launch_experiment.sh imagenet vit_small_imagenet 1 1.0 4 false 0.2 n rsst data.path=FOLDER data.val_fraction=0.2 \\
      train.global_batch=8 train.batch_per_device=null pruning.schedule.rounds=1

PYTHON is the interpreter (default: .venv of this checkout, otherwise python3), PROCESSES the number of processes that
train (default: one per GPU).
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from vit_rsst.cli.old_names import CHOICES, FIELDS, FLAGS, LABELS, OTHERS, POSITIONALS, Arguments, translate_
from vit_rsst.errors import InputError
from vit_rsst.recipe.loading import builtin_folder, find, load
from vit_rsst.train import guarded

PASSED_ON = ("--restart", "--allow-world-size-change", "--allow-data-change")
OWN = ("--yes", "--dry-run", *PASSED_ON)
OLD_NAMES = (*CHOICES, *FIELDS, *OTHERS, *LABELS)
SIGNALS = {  # and what the training gets for each
    signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM, signal.SIGHUP: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Translates the arguments and trains; returns the exit code of the training."""
    codes: list[int] = []
    return guarded(lambda: codes.append(launch(sys.argv[1:] if argv is None else argv))) or codes[0]


def usage() -> str:
    names = textwrap.fill(" ".join(f"--{name}" for name in OLD_NAMES), 120, break_on_hyphens=False)
    return f"{__doc__}\nOld names, in addition to the positionals:\n{names}\n"


def launch(argv: Sequence[str]) -> int:
    """Prints what the arguments become, asks where AUTO is n, and trains; returns the exit code.

    Raises:
        InputError: an argument or a field of the recipe is wrong.
    """
    if {"-h", "--help"} & set(argv):
        print(usage())
        return 0
    try:
        old, options = parse(argv)
        name = translate_(old)
        if not re.fullmatch(r"([1-9][0-9]*)?", processes := os.environ.get("PROCESSES", "")):
            raise InputError(f"PROCESSES: '{processes}' is not a positive whole number.")
    except InputError as error:
        print(usage(), file=sys.stderr)
        raise InputError(f"{error} Nothing was started.") from None
    overrides = [*old.made, *old.user_overrides]
    recipe = load(find(name), overrides)
    num_processes = int(processes or num_devices())
    command = [*trainer(num_processes), name, *overrides, *(option for option in options if option in PASSED_ON)]
    warnings = [f"warning: {sentence}" for sentence in old.warnings]
    text = "\n".join([*old.told, *old.user_overrides, *warnings, "", "without this script:", shlex.join(command), ""])
    print(text, flush=True)
    if "--dry-run" in options or old["AUTO"] == "n":
        from vit_rsst.assembly.planning import plan_text

        print(plan_text(recipe, num_processes), flush=True)
    if "--dry-run" in options:
        return 0
    if old["AUTO"] == "n" and "--yes" not in options:
        print("\nStart? [y/N] ", end="", flush=True)
        if not sys.stdin.readline().strip().lower().startswith("y"):
            print("nothing was started")
            return 0
    return train(command, text, recipe.run_folder, num_processes)


def parse(argv: Sequence[str]) -> tuple[Arguments, list[str]]:
    """The arguments of the old program with the overrides, and the options of this one.

    Raises:
        InputError: an unknown option, an option without a value, or too many positionals.
    """
    given, overrides, options, labels, rest = {}, [], [], list(POSITIONALS), list(argv)
    while rest:
        word = rest.pop(0)
        option, equals, value = word.partition("=")
        name = option[2:].replace("-", "_")
        if word in OWN:
            options.append(word)
        elif word.startswith("--"):
            if name not in OLD_NAMES:
                choices = " ".join([*OWN, *(f"--{known}" for known in OLD_NAMES)])
                raise InputError(f"{option}: unknown option; expected one of: {choices}.")
            if name in FLAGS and not equals and rest[:1] not in (["true"], ["false"]):
                value = "true"
            elif not equals and rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            if not value:
                raise InputError(f"{option}: missing value.")
            given[LABELS.get(name, name)] = value
        elif re.match(r"-[^0-9.]", word):
            raise InputError(f"{word}: unknown option; options start with two dashes.")
        elif re.match(r"[A-Za-z].*=", word):
            overrides.append(word)
        elif labels:
            given[labels.pop(0)] = word
        else:
            raise InputError(f"'{word}': too many arguments.")
    return Arguments(given, overrides), options


def num_devices() -> int:
    import torch

    return max(torch.cuda.device_count(), 1)


def trainer(num_processes: int) -> list[str]:
    """The start of a command that trains, which can be typed by hand."""
    path = os.environ.get("PYTHONPATH")
    command = [*(["env", f"PYTHONPATH={path}"] if path else []), sys.executable]
    if num_processes > 1:  # the recipe decides on the precision
        config = builtin_folder().parent / "accelerate_configs" / "gpu_8x_bf16.yaml"
        command += ["-m", "accelerate.commands.launch", "--config_file", str(config)]
        command += ["--num_processes", str(num_processes), "--mixed_precision", "no"]
    return [*command, "-m", "vit_rsst.train"]


def train(command: Sequence[str], text: str, run_folder: Path, num_processes: int) -> int:
    """Trains, and keeps the output in the run folder too; returns the exit code."""
    log, status = run_folder / "logs" / time.strftime("launch-%Y%m%d-%H%M%S.log"), run_folder / "status.json"
    was_there = run_folder.exists()
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(f"{text}\n", encoding="utf-8")
    before = status.read_bytes() if status.exists() else b"{}"
    code = run(command, log)
    after = status.read_bytes() if status.exists() else before
    if num_processes > 1 and after != before and (recorded := json.loads(after).get("exit_code")) is not None:
        code = recorded  # accelerate's launcher turns every failure into 1
    aside = next(run_folder.parent.glob(f"{run_folder.name}.old-*/logs/{log.name}"), None)
    if aside is not None and not log.exists():  # --restart takes the log with the old run
        log.parent.mkdir(parents=True, exist_ok=True)
        aside.rename(log)
        if not was_there:  # the old run is this log and a lock
            (aside.parent.parent / ".lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it holds more
            os.removedirs(aside.parent)
    print(f"\nlog: {log}")
    return code


def run(command: Sequence[str], log: Path) -> int:
    """Runs a command in a process group of its own, so that it gets each signal once: from here."""
    torchrun = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "170"}
    early: list[int] = []
    send = early.append  # until there is a process to pass them on to
    before = {number: signal.signal(number, lambda number, _: send(SIGNALS[number])) for number in SIGNALS}
    try:
        with open(log, "ab", buffering=0) as file, subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0,
            env=os.environ | torchrun | {"PYTHONUNBUFFERED": "1"},
        ) as process:  # fmt: skip
            send = process.send_signal
            for number in early:
                send(number)
            while chunk := process.stdout.read1():
                file.write(chunk)
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
            code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
