"""AdamW over float32 master weights, with the schedules of ALGORITHMS and gradient clipping.

The model computes in its own dtype. Where that is bfloat16, float32 masters are kept here: gradients of
each micro-batch are added up in float32, the step is taken on the masters and rounded into the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from trimtab.models.sharded import local
from trimtab.trainer.ranks import ALONE, Ranks
from trimtab.trainer.stages import OptimizerConfig


def masters_of(model: torch.nn.Module, compute_dtype: str) -> dict[str, torch.Tensor] | None:
    """Move a float32 model's parameters to its compute dtype; returns the float32 weights that those which train were
    rounded from.

    None for float32. Buffers stay as they are: rounded to bfloat16, the frequencies of rotary positions would turn the
    farther tokens by other angles than in the services, which read the same weights.
    """
    if compute_dtype == "float32":
        return None
    masters = {
        name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return masters


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Rate of optimizer step `step` (0-based): warm-up from 1/10, then constant, cosine to 10 % or linear to 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (0.1 + 0.9 * step / config.warmup_steps)
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    if config.schedule == "cosine":
        return config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress))))
    if config.schedule == "linear":
        return config.learning_rate * max(0.0, 1 - progress)
    return config.learning_rate


class MasterWeightOptimizer:
    """AdamW whose parameters are float32 masters of a model's weights.

    Attributes:
        masters: one float32 (or float64) tensor a trainable parameter; the parameter itself where it has that dtype.
            Of a sharded model they are this rank's shards.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: OptimizerConfig,
        masters: dict[str, torch.Tensor] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """`masters` gives float32 values by parameter name that the model's own weights are roundings of."""
        self.config = config
        self.ranks = ranks
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.parameters = [parameter for _, parameter in named]
        self.masters = [_master(name, parameter, masters) for name, parameter in named]
        if ranks.world == 1:
            _let_embeddings_be_sparse(model)
        self._adam = torch.optim.AdamW(
            self.masters,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def accumulate(self) -> None:
        """Move the gradients of a micro-batch's backward pass onto the masters, added up in their dtype."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is master or parameter.grad is None:
                continue
            gradient = local(parameter.grad)
            if master.grad is None:
                master.grad = gradient.to(master.dtype)
            else:
                master.grad.add_(gradient)
            parameter.grad = None

    def add(self, gradients: Sequence[torch.Tensor]) -> None:
        """Add gradients that came apart from the parameters, one a parameter, onto the masters in their dtype."""
        for master, gradient in zip(self.masters, gradients, strict=True):
            if master.grad is None:
                master.grad = gradient.to(master.dtype)
            else:
                master.grad.add_(gradient)

    def step(self, learning_rate: float) -> float:
        """Clip, step, round into the model, clear gradients; returns the gradient's norm before clipping.

        A non-finite norm takes no step (the caller counts it).
        """
        for master in self.masters:
            if master.grad is not None and master.grad.is_sparse:
                master.grad = master.grad.to_dense()
        gradients = [master.grad for master in self.masters if master.grad is not None]
        total = self.ranks.norm(torch.nn.utils.get_total_norm(gradients))
        torch.nn.utils.clip_grads_with_norm_(self.masters, self.config.max_grad_norm, total)
        norm = float(total)
        if math.isfinite(norm):
            for group in self._adam.param_groups:
                group["lr"] = learning_rate
            self._adam.step()
            with torch.no_grad():
                for parameter, master in zip(self.parameters, self.masters, strict=True):
                    if parameter is not master:
                        local(parameter).copy_(master)
        self.clear()
        return norm

    def clear(self) -> None:
        """Drop all gradients."""
        for tensor in (*self.parameters, *self.masters):
            tensor.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Masters and Adam moments: all that a resume needs."""
        return {"masters": [master.detach() for master in self.masters], "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, and round the masters into the model."""
        with torch.no_grad():
            for parameter, master, saved in zip(self.parameters, self.masters, state["masters"], strict=True):
                master.copy_(saved)
                local(parameter).copy_(saved)
        self._adam.load_state_dict(state["adam"])


def _let_embeddings_be_sparse(model: torch.nn.Module) -> None:
    """Have a CPU's backward passes give an embedding's gradient by the rows that were read.

    A dense one, [V, D], is written, and added to the last, for every micro-batch: at a vocabulary of 32,000 it takes 6
    to 9 % of a small model's training (docs/results/ppo_step.md), and as much memory as the embedding.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.weight.device.type == "cpu":
            module.sparse = True


def _master(name: str, parameter: torch.nn.Parameter, masters: dict[str, torch.Tensor] | None) -> torch.Tensor:
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter if local(parameter) is parameter else local(parameter).requires_grad_()
    source = parameter if masters is None else masters[name]
    return local(source.detach()).float().clone().requires_grad_()
