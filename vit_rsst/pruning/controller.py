"""The controller: asks the method for a plan and carries it out on the model's weights, in place.

It enforces masks, lets the condemned fade, commits targets, rewinds, and measures the cost of each removal. It knows
nothing about recipes, loaders or trackers. Weights keep their names and storage, so Accelerate, DDP and FSDP2 notice
nothing; of sharded weights, each rank edits the rows it holds.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from vit_rsst import shards
from vit_rsst.progress import Progress, at_fraction
from vit_rsst.pruning.agreement import agreed, fingerprints, share_buffers_
from vit_rsst.pruning.criteria import Evidence, Statistics
from vit_rsst.pruning.fading import Fading
from vit_rsst.pruning.foreach import factors, products, zero_
from vit_rsst.pruning.granularity import units_left
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.movement import Movement
from vit_rsst.pruning.patterns import pattern
from vit_rsst.pruning.plan import RAMPS_OF_0_1, Density, Growth, Method, Penalty, PruningView, changes_within_rounds
from vit_rsst.pruning.selector import Selector
from vit_rsst.pruning.swapping import swap
from vit_rsst.seeds import derived_seed
from vit_rsst.training import optim
from vit_rsst.training.ema import Ema

Evaluate = Callable[[], Mapping[str, float]]
"""Scores the current model on the validation split: at least `top1` (percent), and `loss`. Collective."""

Calibrate = Callable[[], Statistics]
"""Statistics of the current model on the calibration images. Collective."""

Compensate = Callable[[MaskSet], None]
"""Zeroes what is outside of a mask, and fits the rest to what the layers computed before. Collective."""


@dataclass(frozen=True)
class RoundResult:
    """What pruning did in one round; densities are over prunable weights.

    Attributes:
        density_asked: requested by the schedule; `density` is that of the mask.
        condemned_ratio: mean |w| of the condemned over mean |w| of the kept, just before removal; None: no removal.
        what_if_gap: points of top-1 lost by the removal, measured just before and after it; None: no removal.
        what_if_loss_gap: likewise, increase in loss.
        mask_fingerprints: of the mask on every rank.
        layers: per weight: elements, alive elements, density.
        units: per unit group: kind, units, alive units; empty without units.
    """

    round: int
    density_asked: float
    density: float
    condemned_ratio: float | None
    what_if_gap: float | None
    what_if_loss_gap: float | None
    mask_fingerprints: list[str]
    layers: dict[str, dict[str, float]]
    units: dict[str, dict[str, str | int]]


@dataclass
class RoundState:
    """State of the current round that a resume point holds besides the masks."""

    round: int = -1
    density_asked: float = 1.0
    penalty: Penalty | None = None
    remove_at: float = 1.0
    condemned_norm: float = 0.0
    condemned_ratio: float | None = None
    what_if_gap: float | None = None
    what_if_loss_gap: float | None = None
    forward: str = "masked"


@dataclass
class Controller:
    """Carries out a method's plans on `weights`.

    Attributes:
        model: the unwrapped model; a rewind restores its whole state.
        weights: the prunable parameters by name.
        rounds: sparse rounds of the schedule.
        density: fraction of the schedule → density.
        rewind_epoch: epochs of round 0 after which the rewind point is taken; None: no rewind point.
        selector: selects masks for the method.
        calibrate: for criteria that need calibration images; None: not needed.
        compensate: lets the weights that stay make up for those that leave; None: they keep their values.
        evaluate: scores the model before and after a removal; None: what-if gaps are not measured.
        mask: elements alive now.
        fading: of the condemned of this round; None: nothing is condemned.
        ema: moving average that is evaluated and saved in place of the weights; None: no averaging.
    """

    model: nn.Module
    weights: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    method: Method
    rounds: int
    density: Callable[[float], Density]
    selector: Selector
    rewind_epoch: int | None
    seed: int
    evaluate: Evaluate | None
    mask: MaskSet
    ema: Ema | None = None
    calibrate: Calibrate | None = None
    compensate: Compensate | None = None
    fading: Fading | None = None
    rewind_point: dict[str, Tensor] | None = None
    state: RoundState = field(default_factory=RoundState)
    dense: list[Tensor] | None = None  # straight-through: the dense weights, while the model holds w · M
    movement: Movement | None = None  # over the steps of this round, for criteria that need it
    gradients: dict[str, Tensor] | None = None  # of all elements, before they are masked, until the end of the step
    _made: tuple[MaskSet, list[Tensor]] | None = field(default=None, repr=False)  # cached factors of the mask

    # -- called by the loop, in this order

    def begin_round(self, round: int) -> bool:
        """Plans the round and prepares the weights. False if the round was already under way before a resume."""
        if self.state.round == round:
            return False
        before = self.state
        try:
            self._begin_round(round)
        except BaseException:  # such as an interrupt while calibration images are read: the round has not begun
            self.state = before
            raise
        return True

    def _begin_round(self, round: int) -> None:
        if self.rewind_epoch == 0 and round == 0:
            self.rewind_point = self._model_on_host()
        self.state = RoundState(round, density_asked=self.state.density_asked)
        plan = self.method.plan(round, self._view())
        if self.mask.minus(plan.mask).num_alive:
            self._remove_(plan.mask)
        if plan.start_from == "rewind" and self.rewind_point is not None:
            self._rewind_()
        self._set_mask_(plan.mask)
        self.state = replace(self.state, forward=plan.forward)
        if plan.target is not None:
            self.fading = Fading(self.weights, self.optimizer, ~(self.mask & plan.target), plan.penalty)
            self.state = replace(
                self.state, penalty=plan.penalty, remove_at=plan.remove_at, condemned_norm=self._norm(self.condemned)
            )
        fingerprints(self.mask if plan.target is None else plan.target)
        if self.ema is not None:
            self.ema.restart_()
        if self.selector.criterion.needs == "movement":
            self.movement = Movement.zeros(self.weights)

    @property
    def condemned(self) -> MaskSet | None:
        """Elements alive now and removed later in this round; None: none."""
        return None if self.fading is None else self.mask & self.fading.leaving

    @torch.no_grad()
    def before_forward(self) -> None:
        """Straight-through: replaces the weights by w · M until after the backward pass."""
        if self.state.forward == "straight_through":
            weights = self._weights()
            self.dense = [torch.empty_like(weight) for weight in weights]
            torch._foreach_copy_(self.dense, weights)
            self.enforce_()
            self._made = None

    @torch.no_grad()
    def after_backward(self, progress: Progress) -> None:
        """Masks gradients before clipping, so that the clipped and logged norm is that of alive weights."""
        if self.state.forward == "straight_through":  # the gradient at w · M serves as that at w
            self.restore_dense_()
            return
        others = [] if self.fading is None else self.fading.begin_step(progress)
        found = products(*others) if self.movement is None else self.movement.note(self.weights, *others)
        if found:
            [self.fading.before] = found
        if self.reads_gradients(progress):  # averaged over ranks and micro-batches already
            read = {name: torch.zeros_like(w) if w.grad is None else w.grad.clone() for name, w in self.weights.items()}
            self.gradients = read
        if (masking := self.masks_gradients(progress)) is None:
            return
        _, where = masking
        made = self.fading.factors if where else self._factors()
        pairs = [(w.grad, f) for w, f in zip(self.weights.values(), made, strict=True) if w.grad is not None]
        if pairs:
            zero_(shards.locals_of(grad for grad, _ in pairs), [f for _, f in pairs], where)

    def masks_gradients(self, progress: Progress) -> tuple[MaskSet, bool] | None:
        """What the loss's gradient does not reach in this step: where the mask has this value; None: it reaches all."""
        if self.state.forward == "straight_through":
            return None
        if self.fading is not None and self.fading.blocks_gradient(progress):
            return self.fading.leaving, True
        return None if self.mask.is_full else (self.mask, False)

    def reads_gradients(self, progress: Progress) -> bool:
        """Whether the method needs the gradients of all elements in this step."""
        gradual = self.method.gradual
        return self.method.reads_gradients and (gradual is None or gradual.fraction_at(progress) is not None)

    @torch.no_grad()
    def before_step(self, progress: Progress) -> None:
        """Adds the coupled penalty to the clipped gradient; else cancels the weight decay of the condemned."""
        if self.fading is not None:
            self.fading.add_to_gradients_(progress)

    @torch.no_grad()
    def after_step(self, progress: Progress, skipped: Tensor | None = None) -> None:
        """Shrinks the condemned, keeps dead weights at zero, then removes the condemned or sets the method's new mask.

        Args:
            skipped: 1.0 on the weights' device if the optimizer skipped the step, else 0.0; None: not skipped.
        """
        if self.movement is not None:
            self.movement.add_(skipped)
        if self.fading is not None and self.fading.is_active(progress):
            self.fading.shrink_(progress, skipped)
            self.fading.end_step()
        elif not self.mask.is_full and self.state.forward == "masked":
            self.enforce_()
        self._made = None
        if self.ema is not None:
            share_buffers_(self.model)
            self.ema.update_()
        done = progress.round_step + 1
        if self.fading is not None and done >= at_fraction(self.state.remove_at, progress.round_steps):
            self._remove_(self.mask.minus(self.fading.leaving))
        view = self._view(progress.global_step)
        if changes_within_rounds(self.method) and (new := self.method.refresh(progress, view)) is not None:
            self._commit_(new)
        self.gradients = None

    @contextmanager
    def as_deployed(self) -> Iterator[None]:
        """Swaps in the weights as the ticket will hold them: averaged if there is an average, and masked."""
        self._follow_()
        with nullcontext() if self.ema is None else self.ema.in_place():
            self.before_forward()
            try:
                yield
            finally:
                self.restore_dense_()

    def is_settled(self, progress: Progress) -> bool:
        """Whether this round has no removal and no rewind point ahead."""
        if self.fading is not None:
            return False
        if progress.round == 0 and progress.epoch < (self.rewind_epoch or 0):
            return False
        if not changes_within_rounds(self.method):
            return True
        gradual = self.method.gradual
        return gradual is not None and progress.round_step >= gradual.steps(progress.round_steps).stop

    def after_epoch(self, progress: Progress) -> None:
        """Takes the rewind point at the end of its epoch in round 0."""
        share_buffers_(self.model)
        if progress.round == 0 and progress.epoch == self.rewind_epoch:
            self.rewind_point = self._model_on_host()

    def end_round(self) -> RoundResult:
        """Applies the mask for good, and checks its zeros and that ranks agree."""
        if self.state.forward == "straight_through":
            self.state = replace(self.state, forward="masked")
            self._set_mask_(self.mask)
        assert self.has_zeros, "a masked weight is not zero"
        return RoundResult(
            round=self.state.round,
            density_asked=self.state.density_asked,
            density=self.mask.density,
            condemned_ratio=self.state.condemned_ratio,
            what_if_gap=self.state.what_if_gap,
            what_if_loss_gap=self.state.what_if_loss_gap,
            mask_fingerprints=fingerprints(self.mask),
            layers=self.mask.layers(),
            units=units_left(self.selector.groups, self.mask),
        )

    @property
    def has_zeros(self) -> bool:
        """Whether every masked weight of this rank is zero."""
        pairs = zip(self._weights(), shards.locals_of(self.mask.tensors()), strict=True)
        return not any(bool((weight.detach() * ~alive).any()) for weight, alive in pairs)

    def metrics(self, progress: Progress) -> dict[str, float]:
        """Metrics at the current step; `condemned_left` is the norm relative to the start of the round."""
        found = {"prune/density": self.mask.density}
        if self.fading is not None and self.fading.penalty is not None:
            found["prune/penalty"] = self.fading.strength_at(progress)
            found["prune/condemned_ratio"] = self._condemned_ratio(self.condemned)
            found["prune/condemned_left"] = self._norm(self.condemned) / max(self.state.condemned_norm, 1e-30)
        if self.state.what_if_gap is not None:
            found["prune/what_if_gap"] = self.state.what_if_gap
        return found

    # -- resume points

    def state_dict(self) -> tuple[dict[str, Tensor], dict]:
        """Tensors (masks packed, the rewind point unpacked) and plain numbers."""
        self._follow_()
        tensors = {f"mask/{name}": bits for name, bits in self.mask.pack().items()}
        if self.condemned is not None:
            tensors |= {f"condemned/{name}": bits for name, bits in self.condemned.pack().items()}
        if self.rewind_point is not None:
            tensors |= {f"rewind/{name}": value for name, value in self._as_shards(self.rewind_point).items()}
        if self.ema is not None:
            tensors |= {f"ema/{name}": value for name, value in self.ema.tensors.items()}
        if self.movement is not None:
            tensors |= {f"movement/{name}": value for name, value in self.movement.scores.items()}
        numbers = {key: value for key, value in vars(self.state).items() if key != "penalty"}
        numbers["penalty"] = vars(self.state.penalty) if self.state.penalty else None
        return tensors, numbers if self.ema is None else numbers | {"ema_steps": self.ema.steps}

    def load_state_dict(self, tensors: Mapping[str, shards.Source], numbers: Mapping) -> None:
        """Inverse of `state_dict`, from whole tensors."""
        parts, numbers = _by_part(tensors), dict(numbers)
        if self.ema is not None:
            self.ema.load_(parts["ema"], numbers.pop("ema_steps"))
        self.mask = MaskSet.unpack(parts["mask"], self.weights)
        condemned = MaskSet.unpack(parts["condemned"], self.weights) if parts["condemned"] else None
        self.rewind_point = self._own_rows(parts["rewind"]) or None
        self.movement = Movement.zeros(self.weights) if parts["movement"] else None
        if self.movement is not None:
            self.movement.load_(parts["movement"])
        penalty = numbers["penalty"]
        if penalty is not None:
            renamed = RAMPS_OF_0_1.get(penalty["ramp"], {})
            penalty = Penalty(**{**penalty, **renamed, "window": tuple(penalty["window"])})
        self.state = RoundState(**{**numbers, "penalty": penalty})
        self.fading = None
        if condemned is not None:
            self.fading = Fading(self.weights, self.optimizer, ~self.mask | condemned, penalty)

    def live(self) -> dict[str, Tensor]:
        """The current weights and their average, by the names they have in a snapshot."""
        averaged = self.ema.tensors if self.ema is not None else {}
        model = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        return model | {f"ema/{name}": value for name, value in averaged.items()}

    def snapshot(self) -> dict[str, Tensor]:
        """What this rank holds of the current weights and their average, on the host, for `restore_`."""
        self._follow_()
        return _on_host(self.live())

    def restore_(self, snapshot: Mapping[str, Tensor]) -> None:
        """Restores a snapshot taken under the current mask."""
        for path, value in self.live().items():
            shards.local(value).copy_(snapshot[path])

    # -- in-place work on the weights

    def _weights(self) -> list[Tensor]:
        """What this rank holds of the weights."""
        return shards.locals_of(self.weights.values())

    def _factors(self) -> list[Tensor]:
        """1 where an element is alive, else 0; see `foreach.factors`. Cached for one step."""
        if self._made is None or self._made[0] is not self.mask:
            self._made = (self.mask, factors(shards.locals_of(self.mask.tensors()), self._weights()))
        return self._made[1]

    @torch.no_grad()
    def enforce_(self) -> None:
        """Zeroes masked weights again: with masked gradients alone, decay and moments would move them."""
        torch._foreach_mul_(self._weights(), self._factors())

    @torch.no_grad()
    def restore_dense_(self) -> None:
        """Straight-through: restores the dense weights."""
        if self.dense is not None:
            torch._foreach_copy_(self._weights(), self.dense)
            self.dense = None

    def _follow_(self) -> None:
        """Copies the condemned into the average unaveraged: they shrink to zero, and it would lag behind."""
        if self.ema is not None and self.fading is not None:
            self.ema.follow_(self.fading.leaving.masks)

    @torch.no_grad()
    def _set_mask_(self, mask: MaskSet) -> None:
        """Sets the mask: removed weights become +0 (not −0, nor NaN · 0), and their moments are cleared."""
        if self.state.forward == "straight_through":  # removed weights stay alive outside of the forward pass
            self.mask = mask
            return
        removed = {name: ~alive for name, alive in mask.masks.items()}
        for name, weight in self.weights.items():
            shards.local(weight).masked_fill_(shards.local(removed[name]), 0.0)
        optim.clear_moments_(self.optimizer, self.weights, removed)
        if self.ema is not None:
            self.ema.zero_(removed)
        self.mask = mask

    def _remove_(self, mask: MaskSet) -> None:
        """Commits `mask` and measures the cost."""
        leaving = self.mask.minus(mask)
        ratio, before = self._condemned_ratio(leaving), self._deployed_scores()
        self._commit_(mask)
        self.fading = None
        after = self._deployed_scores()
        self.state = replace(self.state, condemned_ratio=ratio)
        if before is not None and after is not None:
            more = after["loss"] - before["loss"] if "loss" in before else None
            self.state = replace(self.state, what_if_gap=before["top1"] - after["top1"], what_if_loss_gap=more)
        fingerprints(mask)

    def _commit_(self, mask: MaskSet) -> None:
        """Sets a mask from which elements leave, and lets the others make up for them, in the average too."""
        if self.compensate is not None:
            self._follow_()
            self.compensate(mask)
            if self.ema is not None:
                with self.ema.in_place():
                    self.compensate(mask)
        self._set_mask_(mask)

    def _deployed_scores(self) -> Mapping[str, float] | None:
        if self.evaluate is None:
            return None
        share_buffers_(self.model)
        with self.as_deployed():
            return self.evaluate()

    @torch.no_grad()
    def _rewind_(self) -> None:
        """Copies the rewind point into the model's existing tensors, which the optimizer, DDP and masks refer to."""
        for name, value in self.model.state_dict().items():
            shards.local(value).copy_(self.rewind_point[name])

    def _model_on_host(self) -> dict[str, Tensor]:
        return _on_host(self.model.state_dict())

    def _as_shards(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows that this rank holds of the model's state, as shards of the whole."""
        return {name: shards.like(own[name], value) for name, value in self.model.state_dict().items() if name in own}

    def _own_rows(self, whole: Mapping[str, shards.Source]) -> dict[str, Tensor]:
        """Inverse of `_as_shards` for whole tensors."""
        return {name: shards.part(whole[name], v) for name, v in self.model.state_dict().items() if name in whole}

    # -- queries

    def _view(self, step: int = 0) -> PruningView:
        def anew(evidence: Evidence, density: Density) -> MaskSet:
            return self.selector.units(replace(evidence, alive=MaskSet.full(self.weights)), density)

        return PruningView(
            mask=self.mask,
            rounds=self.rounds,
            density=self.density,
            units=lambda density: self._selected(density, lambda e: self.selector.units(e, density)),
            elements=lambda density: self._selected(density, lambda e: self.selector.elements(e, density)),
            anew=lambda density: self._selected(density, lambda e: anew(e, density)),
            fill=lambda mask, ratio: self._selected(None, lambda e: self.selector.fill(e, mask, ratio)),
            swap=lambda share, growth: self._swapped(share, growth, step),
        )

    def _swapped(self, share: float, growth: Growth, step: int) -> MaskSet:
        """A mask moved on rank 0; gradients that are not finite belong to a step that is skipped, and move nothing."""
        seed = derived_seed(self.seed, "growth", step)
        gradients = self.gradients if growth == "gradient" else None
        if gradients is not None and not _are_finite(gradients.values()):
            return self.mask
        n_of_m = pattern(self.selector.granularity)
        moved = agreed(lambda: swap(self.weights, self.mask, share, gradients, seed, n_of_m and n_of_m[1]), self.mask)
        moved.__dict__["is_full"] = self.mask.is_full  # as many are alive as before; counting would synchronize
        return moved

    def _selected(self, density: Density | None, choose: Callable[[Evidence], MaskSet]) -> MaskSet:
        """A mask selected on rank 0 from the evidence of all ranks."""
        if density is not None:
            self.state.density_asked = self.selector.mean_density(self.weights, density)
        seed = self.seed * 1_000 + self.state.round  # differs by round, the same on every device
        statistics = self.calibrate() if self.calibrate is not None else None
        moved = self.movement.scores if self.movement is not None else None
        evidence = Evidence(self.weights, self.mask, seed, statistics, movement=moved)
        chosen = agreed(lambda: choose(evidence), self.mask)
        if density is not None and self.state.density_asked < 1.0 - 0.5 / self.mask.num_elements:
            chosen.__dict__["is_full"] = False  # known here; counting would synchronize with the device
        return chosen

    def _condemned_ratio(self, condemned: MaskSet) -> float:
        return self._mean_size(condemned) / max(self._mean_size(self.mask.minus(condemned)), 1e-30)

    @torch.no_grad()
    def _mean_size(self, part: MaskSet) -> float:
        return self._sum(lambda weight, inside: (weight.abs() * inside).sum(), part) / max(part.num_alive, 1)

    @torch.no_grad()
    def _norm(self, part: MaskSet) -> float:
        return math.sqrt(self._sum(lambda weight, inside: (weight * inside).square().sum(), part))

    def _sum(self, of: Callable[[Tensor, Tensor], Tensor], part: MaskSet) -> float:
        """Sum over all weights and ranks of a sum over a weight and its mask."""
        sums = [of(*pair) for pair in zip(self._weights(), shards.locals_of(part.tensors()), strict=True)]
        return sum(shards.total(torch.stack(sums), next(iter(self.weights.values()))).tolist())


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the rows that this rank holds, in host memory."""
    return {name: shards.local(value).detach().to("cpu", copy=True) for name, value in tensors.items()}


def _are_finite(gradients: Iterable[Tensor]) -> Tensor:
    """Whether all elements on all ranks are, as a bool on their device."""
    found = list(gradients)
    wrong = torch.stack([(~own.isfinite()).sum() for own in shards.locals_of(found)])
    return shards.total(wrong.sum(), found[0]) == 0


def _by_part(tensors: Mapping[str, shards.Source]) -> dict[str, dict[str, shards.Source]]:
    """`part/name` → part → name."""
    parts: dict[str, dict[str, shards.Source]] = defaultdict(dict)
    for path, value in tensors.items():
        part, name = path.split("/", 1)
        parts[part][name] = value
    return parts
