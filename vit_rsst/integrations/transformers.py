"""Pruning in transformers' `Trainer`, as a callback."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vit_rsst.errors import InputError
from vit_rsst.library import state_file
from vit_rsst.library.pruner import Pruner


class PruningCallback(TrainerCallback):
    """Attaches a `Pruner` for the training; logs with it, and saves and resumes it with the checkpoints.

    Attributes:
        pruner: of the training under way or just ended; None before.
    """

    def __init__(self, *, resume_from: str | Path | None = None, **words: Any):
        """
        Args:
            resume_from: folder of the checkpoint, if `train(resume_from_checkpoint=…)` names one outside of
                `output_dir`.
            words: keywords of `vit_rsst.Pruner` except `total_steps`, which the Trainer knows.
        """
        self.pruner: Pruner | None = None
        self._resume_from, self._words = resume_from, words

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        **_: Any,
    ) -> None:
        """
        Raises:
            InputError: a wrong keyword, or the Trainer would put back weights from before a removal.
            Damaged: the checkpoint to resume from has no state of a `Pruner`.
        """
        if args.load_best_model_at_end:
            raise InputError(
                "PruningCallback: load_best_model_at_end may put back weights from before a removal; set it to False."
            )
        if self.pruner is not None:
            self.pruner.detach()
        self.pruner = Pruner(model, optimizer, total_steps=state.max_steps, **self._words)
        if state.global_step:
            folder = self._resume_from or _checkpoint(args, state)
            self.pruner.load_state_dict(state_file.read(Path(folder) / state_file.FILE))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        found = self._attached().state_dict()
        if state.is_world_process_zero:
            state_file.write(_checkpoint(args, state) / state_file.FILE, found)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        """Adds the pruner's metrics to those of a training step, for the log history and later callbacks."""
        if "loss" in logs:
            metrics = self._attached().metrics()
            logs |= metrics
            state.log_history[-1] |= metrics

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        try:
            self._attached().finish()
        except InputError as error:  # the Trainer was stopped early
            self._attached().detach()
            warnings.warn(str(error), stacklevel=2)

    def _attached(self) -> Pruner:
        assert self.pruner is not None, "the Trainer has not begun"
        return self.pruner


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
