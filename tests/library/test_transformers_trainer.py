"""Pruning inside transformers' `Trainer`: rounds, checkpoints and resume, with accumulation, clipping and bf16."""

import json
from pathlib import Path

import pytest
import torch
from toys_of_others import tiny_bert, tokens
from transformers import Trainer, TrainingArguments
from watching import Watch

from vit_rsst.errors import Damaged, InputError
from vit_rsst.integrations.transformers import PruningCallback

RSST = {"name": "rsst", "penalty": {"residual": 0.01, "window": [0.0, 0.5]}, "remove_at": 0.5}
WORDS = {"rounds": 2, "final_sparsity": 0.75, "method": RSST, "protect": ["classifier*", "*pooler*"]}
STE = {"name": "ste", "window": [0.2, 0.8], "interval": 2}


class Watched(PruningCallback):
    def on_train_begin(self, *arguments, **more):
        super().on_train_begin(*arguments, **more)
        self.watch = Watch(self.pruner, 0.01, (0.0, 0.5))


def trainer_of(
    folder: Path, words: dict, kind: type[PruningCallback] = PruningCallback, **options
) -> tuple[Trainer, PruningCallback]:
    rows = tokens(0, count=24)
    data = [{key: value[i] for key, value in rows.items()} for i in range(24)]
    callback = kind(**words)
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, save_steps=5, max_steps=12,
        per_device_train_batch_size=4, learning_rate=1e-2, save_total_limit=3, **options,
    )  # fmt: skip
    return Trainer(tiny_bert(), arguments, train_dataset=data, callbacks=[callback]), callback


def zeros(trainer: Trainer, callback: PruningCallback) -> bool:
    masks = callback.pruner.masks.items()
    return all(not (trainer.model.get_parameter(name).detach() * ~alive).any() for name, alive in masks)


OPTIONS = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "bf16": True}


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "all"])
def test_the_trainer_ends_at_the_sparsity_that_was_asked_for(tmp_path, options):
    trainer, callback = trainer_of(tmp_path, WORDS, Watched, **options)
    trainer.train()
    assert callback.pruner.density == pytest.approx(0.25, abs=1e-3)
    assert [round(result.density, 2) for result in callback.pruner.results] == [1.0, 0.5, 0.25]
    assert zeros(trainer, callback)
    assert (callback.watch.steps, len(callback.watch.shrunk)) == (12, 2)  # two rounds of a window of two steps
    assert max(callback.watch.shrunk) < 1e-6
    history = [row for row in trainer.state.log_history if "loss" in row]
    assert [round(row["prune/density"], 2) for row in history] == [1.0] * 5 + [0.5] * 4 + [0.25] * 3
    saved = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text(encoding="utf-8"))
    # A window of two steps: σ of the first is a third of ln 100.
    assert saved["log_history"][4]["prune/condemned_left"] == pytest.approx(100 ** (-1 / 3), rel=1e-4)


@pytest.mark.parametrize("method, stop", [(RSST, 5), (RSST, 10), (STE, 5)])
def test_a_resumed_training_ends_bit_for_bit_where_the_undisturbed_one_ends(tmp_path, method, stop):
    words = WORDS | {"method": method} | ({"rounds": None} if method["name"] == "ste" else {})
    whole, _ = trainer_of(tmp_path, words)
    whole.train()
    again, callback = trainer_of(tmp_path, words)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert callback.pruner.is_over
    for (name, one), two in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    (tmp_path / f"checkpoint-{stop}" / "pruner.safetensors").unlink()
    again, callback = trainer_of(tmp_path, words)
    with pytest.raises(Damaged, match=rf"checkpoint-{stop}/pruner.safetensors: not a readable state of a Pruner"):
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    callback.pruner.detach()


def test_what_would_end_wrong_is_refused_at_the_start(tmp_path):
    trainer, _ = trainer_of(tmp_path, WORDS | {"rounds": 40})
    with pytest.raises(InputError, match=r"^Pruner\(total_steps=…\): 12 steps, less 0 dense and 0 of recovery"):
        trainer.train()
    trainer, _ = trainer_of(tmp_path, WORDS)
    trainer.args.load_best_model_at_end = True
    with pytest.raises(InputError, match=r"^PruningCallback: load_best_model_at_end may put back weights"):
        trainer.train()


def test_a_training_that_stops_early_says_so_and_detaches(tmp_path):
    trainer, callback = trainer_of(tmp_path, WORDS)
    callback.on_step_end = lambda args, state, control, **_: setattr(control, "should_training_stop", True)
    with pytest.warns(UserWarning, match="before the last removal"):
        trainer.train()
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks
