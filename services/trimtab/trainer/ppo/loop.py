"""Stage 3, PPO: prompts → completions → scores and reference log-probs → update → publish, step after step.

Step t trains on batch t and makes version t. Batch t is sampled by version t − 1, or one up to `max_staleness` older.
A run that was cut off restores its last checkpoint and trains again on what the journal holds; then it asks for more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial

from trimtab.runtime import tracing
from trimtab.runtime.logs import get_logger
from trimtab.trainer.context import AVERAGE, StageContext
from trimtab.trainer.journal import Journal
from trimtab.trainer.loop_thread import LoopThread
from trimtab.trainer.metrics import MetricWriter, keep_rows
from trimtab.trainer.optimizer import learning_rate
from trimtab.trainer.ppo.exact_kl import load_reference_head
from trimtab.trainer.ppo.experience import Episode, gather_experience
from trimtab.trainer.ppo.pipeline import Pipeline, whole_steps
from trimtab.trainer.ppo.rollout_metrics import rollout_metrics, staleness_mean
from trimtab.trainer.ppo.rollouts import RolloutClients
from trimtab.trainer.ppo.samples import SAMPLES, SampleLog
from trimtab.trainer.ppo.state import PpoState
from trimtab.trainer.ppo.step_times import StepTimes
from trimtab.trainer.run import RunFailedError
from trimtab.trainer.side_by_side import SideBySide
from trimtab.trainer.stages import PpoConfig
from trimtab.weights.errors import VersionConflictError
from trimtab_client import ModelInfo, ModelVersion

log = get_logger(__name__)

MAX_SKIPPED_IN_A_ROW = 3
SHOWN_SAMPLES = 8


def run_ppo(config: PpoConfig, context: StageContext) -> None:
    """Run the stage to its end, from where it was cut off; raises what stops it."""
    context = replace(context, keep_versions=max(context.keep_versions, config.least_versions))
    context.run.doing("loading the policy, the value model and the prompts")
    ranks = context.ranks
    with (
        closing(SideBySide.of_ranks(context.device, context.threads, ranks)) as side_by_side,
        ExitStack() as opened,
    ):
        state = PpoState(config, context, side_by_side)
        saved = context.restore()
        if saved is not None:
            state.load(saved)
        rollouts = ranks.lead(lambda: opened.enter_context(_open(config, state, context)))
        if config.exact_kl:
            context.run.doing("loading the reference's LM head")
            reference = ranks.told(lambda: rollouts.reference)
            head = ranks.in_turn(lambda: reference and load_reference_head(reference, state.policy, context.store))
            state.update.reference_head = head
        replayed_to = ranks.told(lambda: rollouts.replayed_to)
        writer = opened.enter_context(context.open_metrics(config.steps, replayed_to))
        if ranks.leads:
            keep_rows(context.folder / SAMPLES, writer.last_step)
        _Steps(config, context, state, rollouts, writer, replayed_to).run()


@dataclass(frozen=True)
class _Rollouts:
    """Where batches come from; rank 0 has it.

    Attributes:
        reference: what the reference service serves.
        replayed_to: steps up to this one were trained before, by the journal.
    """

    pipeline: Pipeline
    journal: Journal
    reference: ModelInfo | None
    replayed_to: int


@contextmanager
def _open(config: PpoConfig, state: PpoState, context: StageContext) -> Iterator[_Rollouts]:
    """The journal and the services."""
    with (
        closing(Journal(context.state.journal)) as journal,
        closing(LoopThread("rollouts")) as loop,
        _services(config, state, context, loop) as clients,
    ):
        replayed_to = whole_steps(journal, state.step, config.batch_size)
        pipeline = Pipeline(config, clients, state.prompts, journal, context.run, loop, state.step)
        yield _Rollouts(pipeline, journal, clients.reference_model, replayed_to)


@contextmanager
def _services(config: PpoConfig, state: PpoState, context: StageContext, loop: LoopThread) -> Iterator[RolloutClients]:
    """The services, checked against the policy."""
    clients = RolloutClients(config, state.policy.tokenizer, context.run.hindered, context.services)
    try:
        context.run.doing(
            f"waiting for generator {config.generator_address}, reward {config.reward_address}, "
            f"reference {config.reference_address}"
        )
        context.run.wait(loop.submit(clients.check(state.policy.tokenizer_digest)))
        yield clients
    finally:
        loop.submit(clients.close()).result()


class _Steps:
    """The loop itself, on every rank; `rollouts` is asked on rank 0 alone, and the others are told."""

    def __init__(
        self,
        config: PpoConfig,
        context: StageContext,
        state: PpoState,
        rollouts: _Rollouts,
        writer: MetricWriter,
        replayed_to: int,
    ) -> None:
        self.config = config
        self.context = context
        self.state = state
        self.ranks = context.ranks
        self.rollouts = rollouts
        self.writer = writer
        self.replayed_to = replayed_to
        self.samples = SampleLog(context.folder, state.policy.tokenizer)

    def run(self) -> None:
        config, context, state = self.config, self.context, self.state
        self._admit(self._publish({}))
        while state.step < config.steps:
            version = self._step()
            if state.step < config.steps:
                every = config.stage.checkpoint_every_steps
                context.between_steps(state.step, every, state.state, lambda newest=version: newest)
                if state.step % every == 0:
                    self.ranks.told(lambda: self.rollouts.journal.forget(state.step))
        self.ranks.told(lambda: self.rollouts.pipeline.settle())

    def _admit(self, version: ModelVersion) -> None:
        self.ranks.told(lambda: self.rollouts.pipeline.admit(version))

    def _step(self) -> ModelVersion:
        """Train on the next batch, keep it, publish it, report it."""
        config, context, state = self.config, self.context, self.state
        step, times = state.step + 1, StepTimes()
        replayed = step <= self.replayed_to
        context.run.doing("replaying the journal" if replayed else "generating, scoring and referencing")
        batch = self.ranks.told(lambda: self.rollouts.pipeline.take(step))
        episodes = batch.in_order
        times.collected(batch.clocks)

        if not replayed:
            context.run.doing("training")
        context.use_threads()
        experience = gather_experience(episodes)
        epoch = state.update.plan_epoch(experience)
        targets = state.update.fix_targets(experience, epoch, state.kl.coefficient)
        times.valued()
        optimizers = (config.stage.optimizer, config.value_optimizer)
        rates = [learning_rate(optimizer, state.step, config.steps) for optimizer in optimizers]
        warming_up = state.step < config.value_warmup_steps
        with tracing.span(
            "trainer", "train", {"trimtab.step": step, "trimtab.samples": len(batch)}, parent=batch.trace
        ):
            metrics = rollout_metrics(experience, targets) | state.update.optimize(
                experience, epoch, targets, rates[0], rates[1], move_policy=not warming_up
            )
        metrics |= {"beta": state.kl.coefficient, "learning_rate": rates[0]}
        metrics["staleness_mean"] = staleness_mean(episodes, step)
        state.kl.update(metrics["kl_nats_per_sequence"], config.batch_size)
        if state.average is not None:
            state.average.update()
        state.step, state.drawn = step, batch.sampler_state
        self._count_skips(metrics, episodes)
        times.trained()

        context.run.doing("publishing")
        with tracing.span("trainer", "publish", {"trimtab.step": step}, parent=batch.trace):
            version = self._publish(metrics)
        self._admit(version)
        times.published()
        if step > self.writer.last_step:
            self.samples.write(step, episodes, experience, targets)
            self.writer.write(step, config.steps, metrics | times.metrics(experience.lengths_B))
        return version

    def _publish(self, metrics: dict[str, float]) -> ModelVersion:
        """Publish the policy as it is, its moving average just before it."""
        config, state = self.config, self.state
        lineage = {
            "stage": "ppo",
            "prompts": config.prompts,
            "start": config.stage.model,
            "value_start": config.value_model,
        }
        publish = partial(self._publish_once, lineage=lineage, metrics=metrics)
        if state.average is not None:
            with state.average.in_the_model():
                publish(AVERAGE)
        return publish("policy")

    def _publish_once(self, name: str, lineage: dict[str, str], metrics: dict[str, float]) -> ModelVersion:
        """A step that was published before it was cut off is found published.

        Where a device does not train bitwise alike twice, that version stays and its successors follow this training.
        """
        context, step = self.context, self.state.step
        try:
            return context.publish(
                self.state.policy, name, step, lineage=lineage, metrics=metrics, base=self.state.base
            )
        except VersionConflictError as conflict:
            if conflict.known is None or not 0 < step <= self.replayed_to:
                raise
            log.warning("trained again with other last bits; what was published stays", version=str(conflict.known))
            context.run.published(conflict.known)
            return conflict.known

    def _count_skips(self, metrics: dict[str, float], episodes: Sequence[Episode]) -> None:
        """Log the samples of skipped minibatches; stop after three steps in a row with such, as no weights move."""
        state = self.state
        if not metrics["skipped_steps"]:
            state.skipped_in_a_row = 0
            return
        state.skipped_in_a_row += 1
        skipped = state.update.skipped_samples
        log.warning(
            "a loss or gradient was not finite, its minibatches were skipped",
            step=state.step,
            minibatches=int(metrics["skipped_steps"]),
            samples=skipped,
            seeds=[episodes[index].completion.seed for index in skipped],
        )
        if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise RunFailedError(
                f"non-finite loss or gradient in {MAX_SKIPPED_IN_A_ROW} steps in a row; lower the learning rate "
                f"(in step {state.step} with samples {', '.join(map(str, skipped[:SHOWN_SAMPLES]))}, …; all are logged)"
            )
