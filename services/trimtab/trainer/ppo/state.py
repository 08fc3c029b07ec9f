"""All that moves during a PPO run, and how it goes to disk and back.

Not here: the experience since the last checkpoint, which is in the journal. Whitening has no state: its mean and
deviation are those of each batch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trimtab.models.policy import Policy
from trimtab.models.scalar_head import ScalarModel
from trimtab.trainer.adapters import adapter_base, check_frozen
from trimtab.trainer.context import StageContext
from trimtab.trainer.data import load_prompts, tokenize_prompts
from trimtab.trainer.moving_average import MovingAverage
from trimtab.trainer.ppo.kl_controller import KLController
from trimtab.trainer.ppo.pretraining import Pretraining
from trimtab.trainer.ppo.prompts import Sampler
from trimtab.trainer.ppo.update import PpoUpdate
from trimtab.trainer.run import RunFailedError
from trimtab.trainer.sft import load_policy, make_optimizer, read_demonstrations, tell_what_was_cut
from trimtab.trainer.side_by_side import SideBySide
from trimtab.trainer.stages import PpoConfig
from trimtab.trainer.state import TrainingState, restore_trained, trained_tensors


class PpoState:
    """Models, optimizers, the moving average, β, samplers and the step.

    Attributes:
        step: steps that were trained.
        base: the version that the policy's adapters go with; None where whole policies are published.
        prompts: the prompt sampler, which runs ahead of `step` by the batches in flight.
        drawn: its state behind the prompts of `step`.
    """

    def __init__(self, config: PpoConfig, context: StageContext, side_by_side: SideBySide) -> None:
        stage, ranks = config.stage, context.ranks
        self.step = 0
        self.skipped_in_a_row = 0
        self.policy, self.value_model, prompts, pretraining = ranks.in_turn(lambda: _load(config, context))
        self._policy_optimizer = make_optimizer(self.policy, stage, stage.optimizer, ranks, config.lora)
        self._value_optimizer = self.value_model and make_optimizer(
            self.value_model, stage, config.value_optimizer, ranks, config.value_lora, "value_lora"
        )
        self.base = adapter_base(config, self.policy, context)
        if self.value_model is not None and config.value_lora is not None:
            check_frozen("value_model", self.value_model, context)
        self.kl = KLController(config.kl_coefficient, config.adaptive_kl_target, config.adaptive_kl_horizon)
        self.prompts = Sampler(prompts, stage.seed)
        self.drawn = self.prompts.state_dict()
        self._permutations = np.random.default_rng([stage.seed, 1])
        self.update = PpoUpdate(
            config,
            self.policy,
            self._policy_optimizer,
            self.value_model,
            self._value_optimizer,
            self._permutations,
            side_by_side,
        )
        self.update.pretraining = pretraining
        self.average = (
            MovingAverage(self.policy.model, self._policy_optimizer, config.ema_decay) if config.ema_decay else None
        )

    def state(self) -> TrainingState:
        """What a resume at this step needs."""
        values: dict[str, Any] = {
            "beta": self.kl.coefficient,
            "skipped_in_a_row": self.skipped_in_a_row,
            "prompts": self.drawn,
            "permutations": self._permutations.bit_generator.state,
        }
        tensors = {"policy": trained_tensors(self.policy.model, self._policy_optimizer)}
        if self.value_model is not None and self._value_optimizer is not None:
            values["value_normalization"] = [self.value_model.mean, self.value_model.std]
            tensors["value"] = trained_tensors(self.value_model.model, self._value_optimizer)
        if self.average is not None:
            tensors["average"] = self.average.state()
        if self.update.pretraining is not None:
            values["pretraining"] = self.update.pretraining.state_dict()
        return TrainingState(self.step, values, tensors)

    def load(self, state: TrainingState) -> None:
        """Go on where `state` was taken. Raises StateError for another model's."""
        values, tensors = state.values, state.tensors
        self.step = state.step
        self.kl.coefficient = values["beta"]
        self.skipped_in_a_row = values["skipped_in_a_row"]
        self.prompts.load_state_dict(values["prompts"])
        self.drawn = self.prompts.state_dict()
        self._permutations.bit_generator.state = values["permutations"]
        restore_trained(self.policy.model, self._policy_optimizer, tensors["policy"])
        if self.value_model is not None and self._value_optimizer is not None:
            restore_trained(self.value_model.model, self._value_optimizer, tensors["value"])
            self.value_model.set_normalization(*values["value_normalization"])
        if self.average is not None:
            self.average.load(tensors["average"])
        if self.update.pretraining is not None:
            self.update.pretraining.load_state_dict(values["pretraining"])


def _load(
    config: PpoConfig, context: StageContext
) -> tuple[Policy, ScalarModel | None, Sequence[np.ndarray], Pretraining | None]:
    """The policy, the value model, the prompts and the pretraining texts."""
    policy = load_policy(config.stage.model, context)
    value_model = load_value_model(config, policy, context) if config.advantage == "gae" else None
    prompts = read_prompts(config, policy)
    context.state.check_data("prompts", prompts)
    return policy, value_model, prompts, read_pretraining(config, policy, context) if config.ptx_data else None


def load_value_model(config: PpoConfig, policy: Policy, context: StageContext) -> ScalarModel:
    """The reward model with its normalisation folded into the head, or a fresh head on the policy.

    Raises:
        RunFailedError: the reward model has another tokenizer than the policy.
    """
    if not config.value_model:
        return ScalarModel.from_policy(policy, seed=config.stage.seed)
    source = context.resolve(config.value_model)
    value_model = ScalarModel.load(source.path_or_id, dtype="float32", device=context.device)
    if value_model.tokenizer_digest != policy.tokenizer_digest:
        raise RunFailedError(
            'value_model: its tokenizer is not the policy\'s; leave it empty ("") for a fresh head with warm-up steps'
        )
    value_model.fold_normalization()
    return value_model


def read_prompts(config: PpoConfig, policy: Policy) -> Sequence[np.ndarray]:
    """The prompt set as ids; prompts that leave no room for max_new_tokens are dropped."""
    limit = min(config.stage.max_length, policy.max_length) - config.max_new_tokens
    if limit < 1:
        raise RunFailedError(f"max_new_tokens {config.max_new_tokens} leaves no room for a prompt in {limit} tokens")
    prompts = tokenize_prompts(load_prompts(config.prompts), policy.tokenizer, limit)
    tell_what_was_cut(config.prompts, prompts, limit)
    if not len(prompts):
        raise RunFailedError(f"{config.prompts}: no prompt fits into {limit} tokens")
    return list(prompts)


def read_pretraining(config: PpoConfig, policy: Policy, context: StageContext) -> Pretraining:
    """The texts of PPO-ptx; rows as in SFT, of which each without a prompt is learnt whole."""
    texts = read_demonstrations(config.ptx_data, policy, config.stage.max_length)
    context.state.check_data("ptx_data", texts.sequences)
    return Pretraining(
        texts,
        coefficient=config.ptx_coefficient,
        batch_size=config.ptx_batch_size or config.minibatch_size,
        micro_batch_tokens=config.stage.micro_batch_tokens,
        seed=config.stage.seed,
    )
