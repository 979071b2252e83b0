"""Pruning inside Lightning's `Trainer`, whose optimizers step with a closure around the forward pass."""

import pytest
import torch
from toys_of_others import vit
from watching import Watch

pytestmark = pytest.mark.slow
lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from vit_rsst.errors import InputError  # noqa: E402
from vit_rsst.integrations.lightning import PruningCallback  # noqa: E402

RSST = {"name": "rsst", "penalty": {"residual": 0.01, "window": [0.0, 0.5]}, "remove_at": 0.5}
STE = {"name": "ste", "window": [0.1, 0.8], "interval": 2}


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = vit()
        self.seen = []

    def training_step(self, batch, _):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.seen.append(float((self.net.blocks[0].mlp.fc1.weight == 0).float().mean()))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


class Watched(PruningCallback):
    watch = None

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        if self._words["method"] is RSST:
            self.watch = Watch(self.pruner, 0.01, (0.0, 0.5))


def fitted(
    folder, words: dict, max_steps: int = 12, resume=None, batch: int = 4, **options
) -> tuple[Classifier, PruningCallback]:
    images = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images, torch.arange(24) % 10), batch_size=batch
    )
    module, callback = Classifier(), Watched(final_sparsity=0.75, **words)
    saving = lightning.callbacks.ModelCheckpoint(folder, every_n_train_steps=7, save_top_k=-1, filename="{step}")
    trainer = lightning.Trainer(
        max_steps=max_steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[callback, saving], num_sanity_val_steps=1, **options,
    )  # fmt: skip
    trainer.fit(module, loader, loader, ckpt_path=resume)
    return module, callback


@pytest.mark.parametrize(
    "words, options",
    [
        ({"method": RSST, "rounds": 2}, {}),
        (
            {"method": RSST, "rounds": 2},
            {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "precision": "bf16-mixed"},
        ),
        ({"method": STE}, {"accumulate_grad_batches": 2}),
    ],
)  # fmt: skip
def test_lightning_ends_at_the_sparsity_that_was_asked_for_with_zeros(tmp_path, words, options):
    module, callback = fitted(tmp_path, words, **options)
    assert callback.pruner.density == pytest.approx(0.25, abs=1e-3)
    assert not any("head" in name or "patch_embed" in name for name in callback.pruner.masks)
    for name, alive in callback.pruner.masks.items():
        assert not (module.get_parameter(name).detach() * ~alive).any()
    assert module.seen[-1] > 0.3  # evaluated with its zeros
    if callback.watch is not None:
        assert (callback.watch.steps, len(callback.watch.shrunk)) == (12, 2)
        assert max(callback.watch.shrunk) < 1e-6


@pytest.mark.parametrize("words", [{"method": RSST, "rounds": 2}, {"method": STE}], ids=["rsst", "ste"])
def test_a_resumed_fit_ends_bit_for_bit_where_the_undisturbed_one_ends(tmp_path, words):
    # An epoch is one batch: Lightning does not find its place within an epoch of a plain loader.
    whole, _ = fitted(tmp_path / "whole", words, batch=24)
    again, callback = fitted(tmp_path / "again", words, batch=24, resume=tmp_path / "whole" / "step=7.ckpt")
    assert callback.pruner.is_over
    for (name, one), two in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


def test_a_fit_without_an_end_is_refused(tmp_path):
    with pytest.raises(InputError, match="the training has no end; set max_epochs or max_steps"):
        fitted(tmp_path, {"method": RSST}, max_steps=-1, max_epochs=-1)
