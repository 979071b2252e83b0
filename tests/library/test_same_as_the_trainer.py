"""A plain loop with a `Pruner` ends bit for bit where the project's own loop ends: one controller drives both."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "pruning"))
from toys import Toy, batchnorm_mlp, bits, train_rounds, vit

import vit_rsst
from vit_rsst import loop
from vit_rsst.pruning.methods.constant import Constant
from vit_rsst.pruning.methods.dense import Dense
from vit_rsst.pruning.methods.gmp import Gmp
from vit_rsst.pruning.methods.imp import Imp
from vit_rsst.pruning.methods.refill import Refill
from vit_rsst.pruning.methods.rigl import RigL
from vit_rsst.pruning.methods.rsst import Rsst
from vit_rsst.pruning.methods.rst import Rst
from vit_rsst.pruning.methods.set import SparseEvolutionary
from vit_rsst.pruning.methods.ste import StraightThrough
from vit_rsst.pruning.plan import Penalty
from vit_rsst.run.state import Run
from vit_rsst.training import optim

ROUNDS, ONCE = (2, 2, 2), (6,)
COUPLED = Penalty("linear", strength=0.5, window=(0.125, 0.625), coupling="gradient")
TOYS = {
    "rsst": Toy(Rsst(Penalty("quadratic", window=(0.125, 0.625)), 0.75), batchnorm_mlp, round_epochs=ROUNDS),
    "rsst, sgd": Toy(Rsst(remove_at=0.75), optimizer="sgd", lr=0.1, round_epochs=ROUNDS),
    "rsst, coupled": Toy(Rsst(COUPLED, 0.75), optimizer="sgd", lr=0.1, round_epochs=ROUNDS),
    "rsst, accumulated": Toy(Rsst(remove_at=0.75), accumulation=2, round_epochs=ROUNDS),
    "rsst, at the end": Toy(Rsst(remove_at=1.0), round_epochs=ROUNDS),
    "rst": Toy(Rst(), criterion="random", rewind_epoch=0, round_epochs=ROUNDS),
    "imp": Toy(Imp(), batchnorm_mlp, clip=None, round_epochs=ROUNDS),
    "imp, rewound": Toy(Imp(), optimizer="sgd", rewind_epoch=0, round_epochs=ROUNDS),
    "imp by units": Toy(
        Imp(), vit, granularity="head+neuron", scope="isomorphic", final_sparsity=0.5, round_epochs=ROUNDS
    ),
    "refill": Toy(Refill(), vit, granularity="neuron", criterion="survivors", final_sparsity=0.5, round_epochs=ROUNDS),
    "gmp": Toy(Gmp((0.1, 0.9), 5), curve="cubic", round_epochs=ONCE),
    "gmp by movement": Toy(Gmp((0.1, 0.9), 5), criterion="movement", clip=None, round_epochs=ONCE),
    "ste": Toy(StraightThrough((0.1, 0.8), 3), batchnorm_mlp, curve="cubic", round_epochs=ONCE),
    "set": Toy(SparseEvolutionary(interval=4), criterion="random", scope="erk", round_epochs=ONCE),
    "rigl": Toy(RigL(interval=4), criterion="random", scope="erk", clip=None, accumulation=2, round_epochs=ONCE),
    "dense": Toy(Dense(), batchnorm_mlp, round_epochs=ONCE),
    "constant": Toy(Constant(), round_epochs=ONCE),
}  # fmt: skip


def pruner_of(toy: Toy, run: Run, **more) -> vit_rsst.Pruner:
    """As a user would ask for what the toy does."""
    words = {"method": toy.method, "seed": toy.seed, "granularity": toy.granularity, "scope": toy.scope}
    if toy.method.prunes:
        words |= {"criterion": toy.criterion, "schedule": toy.curve, "final_sparsity": toy.final_sparsity}
        words |= {"min_neurons": 2, "max_layer_sparsity": 1.0}
    if not toy.method.one_round:
        words |= {"rounds": len(toy.round_epochs) - 1, "dense_steps": toy.round_epochs[0] * toy.steps_per_epoch}
        words |= {"rewind": "init" if toy.rewind_epoch == 0 else None}

    def on_event(event):
        if event.name == "round began":  # as the trainer does; a loop with one schedule for all rounds need not
            run.optimizer.state.clear()

    return vit_rsst.Pruner(
        run.model, run.optimizer, total_steps=run.progress.total_steps, on_event=on_event,
        evaluate=lambda: run.evaluate("val"), **words, **more,
    )  # fmt: skip


def plain_steps(clip: float | None, run: Run, stop: int | None = None):
    """A loop as anybody writes it, over the same batches, rates and draws; it knows nothing about pruning."""
    optimizer = run.optimizer.optimizer
    for _ in run.progress.remaining_rounds():
        for _ in run.progress.remaining_epochs():
            run.model.train()
            for micro_batches in run.loader.steps(run.progress):
                if run.progress.global_step == stop:
                    return
                loop.seed_step(run)
                optim.set_lr_(optimizer, run.lr(run.progress))
                for images, labels in micro_batches:
                    (run.loss(run.model(images), labels) / len(micro_batches)).backward()
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(run.model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
                run.progress.advance()


def made(name: str, folder: Path) -> Run:
    run = TOYS[name].make(folder)
    if name == "constant":
        vit_rsst.prune(run.net, 0.5, seed=1)
        run.controller.mask = type(run.controller.mask)({n: w.detach() != 0 for n, w in run.controller.weights.items()})
    return run


@pytest.mark.parametrize("name", TOYS)
def test_a_plain_loop_ends_bit_for_bit_where_the_trainer_ends(tmp_path, name):
    run, plain = made(name, tmp_path / "trainer"), made(name, tmp_path / "plain")
    train_rounds(run)
    pruner = pruner_of(TOYS[name], plain)
    plain_steps(TOYS[name].clip, plain)
    assert pruner.is_over
    pruner.finish()
    assert pruner._controller.mask.fingerprint() == run.controller.mask.fingerprint()
    assert bits(plain.net.state_dict()) == bits(run.net.state_dict())
    last = run.controller.end_round()  # the toy's schedule is not rounded to 12 digits, as a recipe's is
    assert pruner.results[-1] == replace(last, density_asked=pytest.approx(last.density_asked, abs=1e-12))


@pytest.mark.parametrize("name", TOYS)
def test_a_plain_loop_that_was_stopped_ends_bit_for_bit_where_it_would_have_ended(tmp_path, name):
    toy, stop = TOYS[name], 11
    whole, first, second = (made(name, tmp_path / part) for part in ("whole", "first", "second"))
    expected = pruner_of(toy, whole)
    plain_steps(toy.clip, whole)
    pruner = pruner_of(toy, first)
    plain_steps(toy.clip, first, stop)
    state = {"model": first.net.state_dict(), "optimizer": first.optimizer.state_dict(), "pruner": pruner.state_dict()}
    torch.save(state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = pruner_of(toy, second)
    second.net.load_state_dict(state["model"])
    second.optimizer.load_state_dict(state["optimizer"])
    resumed.load_state_dict(state["pruner"])
    second.progress.round, (second.progress.epoch, second.progress.step) = (
        (0, divmod(stop, 4)) if toy.method.one_round else (1, (0, 3))
    )
    plain_steps(toy.clip, second)
    assert resumed.results == expected.results
    assert bits(second.net.state_dict()) == bits(whole.net.state_dict())
