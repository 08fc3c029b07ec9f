"""Stage 1, SFT: mean next-token NLL over response tokens, packed, averaged over the global token count.

Publishes `policy` with the weights of the lowest held-out loss (of the end, without held-out data).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from trimtab.models import lora
from trimtab.models.packing import plan_batches
from trimtab.models.policy import Policy
from trimtab.models.scalar_head import ScalarModel
from trimtab.models.sharded import local, spread
from trimtab.runtime.logs import get_logger
from trimtab.trainer.adapters import adapter_base, attach_adapters
from trimtab.trainer.context import StageContext
from trimtab.trainer.data import Tokenized, load_demonstrations, tokenize_demonstrations
from trimtab.trainer.epochs import EpochOrder
from trimtab.trainer.forward import TokenBatch, prepare_for_training, residual_dropout, response_logprobs, slice_batch
from trimtab.trainer.optimizer import MasterWeightOptimizer, learning_rate, masters_of
from trimtab.trainer.ranks import ALONE, Ranks
from trimtab.trainer.run import RunFailedError
from trimtab.trainer.stages import LoraConfig, OptimizerConfig, SftConfig, StageConfig
from trimtab.trainer.state import Tensors, TrainingState, restore_trained, trained_names, trained_tensors
from trimtab_client import ModelVersion

log = get_logger(__name__)


def run_sft(config: SftConfig, context: StageContext) -> None:
    """Run the stage to its end; raises what stops it."""
    stage, ranks = config.stage, context.ranks
    context.run.doing("loading the model and the demonstrations")
    policy, train, validation = ranks.in_turn(lambda: _load(config, context))
    optimizer = make_optimizer(policy, stage, stage.optimizer, ranks, config.lora)
    base = adapter_base(config, policy, context)
    context.use_threads()
    order = EpochOrder(len(train), config.batch_size, config.epochs, stage.seed)
    progress = _Progress(policy, optimizer, dropout_seed=stage.seed)
    saved = context.restore()
    if saved is not None:
        progress.load(saved)

    def publish(step: int, metrics: dict[str, float]) -> ModelVersion:
        lineage = {"stage": "sft", "data": config.data, "start": stage.model}
        return context.publish(policy, "policy", step, lineage=lineage, metrics=metrics, base=base)

    with context.open_metrics(order.total_steps, progress.step) as writer:
        for done, batch in order.batches(progress.step):
            rate = learning_rate(stage.optimizer, done, order.total_steps)
            context.run.doing("training")
            masks = progress.dropout_of(done)
            with residual_dropout(policy, config.dropout, masks), lora.input_dropout(policy.model, masks):
                loss = accumulate_nll(policy, train, batch, stage.micro_batch_tokens, optimizer)
            norm = optimizer.step(rate)
            step = progress.step = done + 1
            progress.loss = loss
            metrics = {
                "loss": loss,
                "grad_norm_policy": norm,
                "learning_rate": rate,
                "epoch": step / order.steps_per_epoch,
            }
            if validation is not None and (step % config.evaluate_every_steps == 0 or step == order.total_steps):
                context.run.doing("evaluating on held-out demonstrations")
                metrics["validation_loss"] = mean_nll(policy, validation, stage.micro_batch_tokens, ranks)
                metrics["validation_perplexity"] = float(np.exp(metrics["validation_loss"]))
                progress.note_held_out(metrics["validation_loss"])
            writer.write(step, order.total_steps, metrics)
            if not np.isfinite(loss):
                raise RunFailedError(f"step {step}: the loss is {loss}; lower learning_rate or check the data")
            if step < order.total_steps:
                every = stage.checkpoint_every_steps
                context.between_steps(step, every, progress.state, partial(publish, step, {"loss": loss}))
        progress.take_best()
        final = {"loss": progress.loss}
        if validation is not None:
            final |= {"validation_loss": progress.best_loss, "chosen_step": float(progress.best_step)}
        context.run.doing("publishing the policy")
        publish(order.total_steps, final)


class _Progress:
    """What moves during SFT: the weights and their optimizer, the dropout's RNG, the best weights so far."""

    def __init__(self, policy: Policy, optimizer: MasterWeightOptimizer, *, dropout_seed: int) -> None:
        self._model = policy.model
        self._optimizer = optimizer
        self._names = trained_names(policy.model)
        self.step, self.loss = 0, float("nan")
        self._dropout_seed = dropout_seed
        self._dropout = torch.Generator().manual_seed(dropout_seed % (1 << 63))
        self.best_loss, self.best_step = float("inf"), 0
        self._best: Tensors = {}

    def dropout_of(self, step: int) -> torch.Generator:
        """The dropout's RNG: one through the run; with several ranks another a rank and step, so any number goes on."""
        ranks = self._optimizer.ranks
        if ranks.world > 1:
            seed = np.random.SeedSequence([self._dropout_seed, step, ranks.rank]).generate_state(1, np.uint64)
            self._dropout.manual_seed(int(seed[0] >> np.uint64(1)))
        return self._dropout

    def note_held_out(self, loss: float) -> None:
        """Keep the weights if their held-out loss is the lowest so far."""
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, self.step
            named = zip(self._names, self._optimizer.parameters, strict=True)
            self._best = {name: local(weight).detach().clone() for name, weight in named}

    def take_best(self) -> None:
        """Put the best weights into the model, where there was held-out data."""
        if self._best:
            with torch.no_grad():
                for name, weight in zip(self._names, self._optimizer.parameters, strict=True):
                    local(weight).copy_(self._best[name])

    def state(self) -> TrainingState:
        values = {"loss": self.loss, "best_loss": self.best_loss, "best_step": self.best_step}
        parameters = dict(zip(self._names, self._optimizer.parameters, strict=True))
        tensors = {
            "policy": trained_tensors(self._model, self._optimizer),
            "best": {name: spread(weight, parameters[name]) for name, weight in self._best.items()},
        }
        if self._optimizer.ranks.world == 1:
            tensors["random"] = {"dropout": self._dropout.get_state()}
        return TrainingState(self.step, values, tensors)

    def load(self, state: TrainingState) -> None:
        """Go on where `state` was taken."""
        restore_trained(self._model, self._optimizer, state.tensors["policy"])
        self.step, self._best = state.step, state.tensors.get("best", {})
        self.loss, self.best_loss = state.values["loss"], state.values["best_loss"]
        self.best_step = state.values["best_step"]
        if self._optimizer.ranks.world == 1 and "random" in state.tensors:
            self._dropout.set_state(state.tensors["random"]["dropout"])


def _load(config: SftConfig, context: StageContext) -> tuple[Policy, TokenBatch, TokenBatch | None]:
    """The policy, the demonstrations and the held-out ones."""
    stage = config.stage
    policy = load_policy(stage.model, context)
    train = read_demonstrations(config.data, policy, stage.max_length)
    held_out = config.validation_data
    validation = read_demonstrations(held_out, policy, stage.max_length) if held_out else None
    context.state.check_data("data", train.sequences)
    return policy, train, validation


def make_optimizer(
    model: Policy | ScalarModel,
    stage: StageConfig,
    config: OptimizerConfig,
    ranks: Ranks,
    adapters: LoraConfig | None = None,
    field: str = "lora",
) -> MasterWeightOptimizer:
    """Make a loaded model ready to train, by all ranks: adapters, compute dtype, dropout, shards, masters."""
    if adapters is not None:
        attach_adapters(model, adapters, stage.seed, field)
    prepare_for_training(model.model, activation_checkpointing=stage.activation_checkpointing)
    if ranks.world == 1:
        return MasterWeightOptimizer(model.model, config, masters_of(model.model, stage.compute_dtype))
    ranks.shard(model.model, stage.compute_dtype)
    return MasterWeightOptimizer(model.model, config, ranks=ranks)


def load_policy(source: str, context: StageContext) -> Policy:
    """Load a policy to train, in float32."""
    return Policy.load(context.resolve(source).path_or_id, dtype="float32", device=context.device)


def read_demonstrations(source: str, policy: Policy, max_length: int) -> TokenBatch:
    """Demonstrations as token sequences that end with the policy's end token."""
    eos = policy.eos_token_ids[0] if policy.eos_token_ids else None
    limit = min(max_length, policy.max_length)
    rows = tokenize_demonstrations(load_demonstrations(source), policy.tokenizer, limit, eos_token_id=eos)
    tell_what_was_cut(source, rows, limit)
    kept = [(row.token_ids_T, max(1, row.prompt_length)) for row in rows if len(row.token_ids_T) >= 2]
    if not kept:
        raise RunFailedError(f"{source}: no demonstration fits into {limit} tokens")
    return TokenBatch(tuple(ids for ids, _ in kept), tuple(prompt for _, prompt in kept))


def tell_what_was_cut(source: str, rows: Tokenized[Any], limit: int) -> None:
    """Log how many rows did not fit whole; nothing is cut in silence."""
    if rows.truncated_count or rows.dropped_count:
        log.warning("rows too long", source=source, limit=limit, cut=rows.truncated_count, dropped=rows.dropped_count)


def accumulate_nll(
    policy: Policy, data: TokenBatch, indices: Sequence[int], micro_batch_tokens: int, optimizer: MasterWeightOptimizer
) -> float:
    """Gradients of the batch's mean NLL over all its response tokens, whatever the micro-batches; returns the mean."""
    lengths = [len(data.sequences[i]) for i in indices]
    token_count = int(sum(data.response_lengths[i] for i in indices))
    total = 0.0
    for micro in optimizer.ranks.plan(lengths, micro_batch_tokens, plan_batches):
        part = slice_batch(data, [indices[i] for i in micro], policy.device)
        loss = -response_logprobs(policy, part).logprob_N.sum() / token_count
        loss.backward()
        optimizer.accumulate()
        total += float(loss.detach())
    return optimizer.ranks.total(total)


@torch.no_grad()
def mean_nll(policy: Policy, data: TokenBatch, micro_batch_tokens: int, ranks: Ranks = ALONE) -> float:
    """Mean NLL over all response tokens, in nats."""
    total = 0.0
    for micro in ranks.plan(data.lengths, micro_batch_tokens, plan_batches):
        total -= float(response_logprobs(policy, slice_batch(data, micro, policy.device)).logprob_N.sum())
    return ranks.total(total) / int(data.response_lengths.sum())
