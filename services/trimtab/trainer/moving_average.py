"""The exponential moving average of a model's master weights (InstructGPT, app. C: of the policy, decay 0.992)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trimtab.models.sharded import local, spread
from trimtab.trainer.optimizer import MasterWeightOptimizer
from trimtab.trainer.state import Tensors, trained_names


class MovingAverage:
    """average ← decay · average + (1 − decay) · weights, in float32, after each step; starts as the weights."""

    def __init__(self, model: torch.nn.Module, optimizer: MasterWeightOptimizer, decay: float) -> None:
        self._model = model
        self._optimizer = optimizer
        self._decay = decay
        self._names = trained_names(model)
        self.average = [master.detach().clone() for master in optimizer.masters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        for average, master in zip(self.average, self._optimizer.masters, strict=True):
            average.lerp_(master, 1 - self._decay)

    @contextmanager
    def in_the_model(self) -> Iterator[None]:
        """The model has the average's weights, in its own dtype, within the block, and bitwise its own after it."""
        own = [local(parameter).detach().clone() for parameter in self._optimizer.parameters]
        self._put(self.average)
        try:
            yield
        finally:
            self._put(own)

    def state(self) -> Tensors:
        """The average by parameter name."""
        parameters = self._optimizer.parameters
        return {n: spread(a, p) for n, a, p in zip(self._names, self.average, parameters, strict=True)}

    def load(self, tensors: Tensors) -> None:
        """Restore what `state` gave."""
        self.average = [tensors[name].to(average) for name, average in zip(self._names, self.average, strict=True)]

    @torch.no_grad()
    def _put(self, weights: list[torch.Tensor]) -> None:
        for parameter, weight in zip(self._optimizer.parameters, weights, strict=True):
            local(parameter).copy_(weight)
