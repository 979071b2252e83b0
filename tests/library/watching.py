"""What holds after every step of any loop: the dead are zero, and the condemned have shrunk by the stated factor."""

import math

import torch

import vit_rsst


class Watch:
    """Looks at the weights before and after each step of the optimizer that a `Pruner` is attached to.

    The penalty must be that of rsst with a linear ramp, which removes at the end of its window.

    Attributes:
        steps: that were seen.
        shrunk: relative error of the condemned in every step in which they shrink and stay.
    """

    def __init__(self, pruner: vit_rsst.Pruner, residual: float, window: tuple[float, float]):
        self.pruner, self.residual, self.window = pruner, residual, window
        self.steps, self.shrunk = 0, []
        self._before, self._factor = {}, None
        pruner.optimizer.register_step_pre_hook(self._note)
        pruner.optimizer.register_step_post_hook(self._check)  # after the pruner's own

    def _note(self, *_: object) -> None:
        progress, condemned = self.pruner.progress, self.pruner._controller.condemned
        start, stop = (round(share * progress.round_steps) for share in self.window)
        number, total = progress.round_step - start + 1, sum(range(1, stop - start + 1))
        self._factor = None
        if condemned is not None and 0 < number < stop - start:  # in the last step of the window they are removed
            self._factor = math.exp(math.log(self.residual) * number / total)
            weights = self.pruner._controller.weights
            self._before = {n: weights[n].detach()[leaves].double() for n, leaves in condemned.masks.items()}
            self._leaving = condemned.masks

    def _check(self, *_: object) -> None:
        weights = self.pruner._controller.weights
        assert all(not (weights[n].detach() * ~alive).any() for n, alive in self.pruner.masks.items())
        self.steps += 1
        if self._factor is not None:
            found = torch.cat([weights[n].detach()[leaves].double() for n, leaves in self._leaving.items()])
            expected = torch.cat(list(self._before.values())) * self._factor
            self.shrunk.append(float((found - expected).abs().max() / expected.abs().max()))
