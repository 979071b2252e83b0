"""Pruning in Lightning's `Trainer`, as a callback."""

import math
import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from vit_rsst.errors import InputError
from vit_rsst.library.pruner import Pruner


class PruningCallback(Callback):
    """Attaches a `Pruner` for the training; logs with it, and is saved and resumed with the checkpoints.

    Attributes:
        pruner: of the training under way or just ended; None before.
    """

    def __init__(self, **words: Any):
        """
        Args:
            words: keywords of `vit_rsst.Pruner` except `total_steps`, which the Trainer knows. Weights have the names
                that they have in the LightningModule.
        """
        self.pruner: Pruner | None = None
        self._words, self._state = words, {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """
        Raises:
            InputError: a wrong keyword, several optimizers, or a training without an end.
        """
        total = trainer.estimated_stepping_batches
        if len(trainer.optimizers) != 1:
            raise InputError(f"PruningCallback: the module has {len(trainer.optimizers)} optimizers; expected one.")
        if not math.isfinite(total):
            raise InputError("PruningCallback: the training has no end; set max_epochs or max_steps of the Trainer.")
        if self.pruner is not None:
            self.pruner.detach()
        self.pruner = Pruner(pl_module, trainer.optimizers[0], total_steps=int(total), **self._words)
        if self._state:
            self.pruner.load_state_dict(self._state)
            self._state = {}

    # Lightning calls the module's steps, not the module: what a forward hook would do is done around them.

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._attached().mask_forward_()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.pruner is not None:  # the sanity check comes before the training
            self.pruner.mask_forward_()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.pruner is not None:
            self.pruner.unmask_forward_()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:
            pl_module.log_dict(self._attached().metrics())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        try:
            self._attached().finish()
        except InputError as error:  # the Trainer was stopped early
            self._attached().detach()
            warnings.warn(str(error), stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.pruner is None else self.pruner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict

    def _attached(self) -> Pruner:
        assert self.pruner is not None, "the Trainer has not begun"
        return self.pruner
