"""PPO updates of TRL's last PPOTrainer (trl 1.12.0, trl.experimental.ppo), timed stage by stage.

It runs in TRL's own environment and imports nothing of trimtab or of the other benchmarks: it reads model folders and
a prompts file, and writes JSON. TRL is used as it is; what is patched only watches the clock, with two exceptions
that make the work comparable and leave its cost alone: the padding token is never sampled (TRL would take it for the
response's end), and with --ragged each response ends at its prompt's own length through a stopping criterion.

What TRL does by itself and what a reader should know: `bf16=True` has no effect in PPOTrainer, so bfloat16 here is
bfloat16 weights, optimizer state included; `gradient_checkpointing` has no effect either; minibatches are only as
asked with gradient_accumulation_steps = 1. A ragged batch is padded to its longest response.
"""
# pyright: reportMissingImports=false
# (trl and datasets are packages of the peer's own environment)

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import cast

STAGES = ("rollout", "reference", "reward", "value", "train", "other")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-dir", type=Path, required=True, help="policy folder with its tokenizer")
    parser.add_argument(
        "--reward-dir", type=Path, required=True, help="one-label model: reward, and start of the value"
    )
    parser.add_argument("--prompts", type=Path, required=True, help='rows {"prompt": text, "response_tokens": int}')
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--updates", type=int, default=4, help="the first is warm-up when there are more")
    parser.add_argument("--ragged", action="store_true", help="each response ends at its row's response_tokens")
    parser.add_argument("--response-tokens", type=int, default=64, help="length of every response when not ragged")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--minibatch-size", type=int, default=16)
    parser.add_argument("--inner-epochs", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


class StageClock:
    """One stage runs at a time, from its mark to the next mark; an update begins at its first mark."""

    def __init__(self) -> None:
        self.updates: list[dict[str, float]] = []
        self._stage: str | None = None
        self._since = 0.0

    def mark(self, stage: str) -> None:
        self._close()
        self._stage = stage

    def begin_update(self, stage: str) -> None:
        self._close()
        self.updates.append(defaultdict(float))
        self._stage = stage

    def end(self) -> None:
        self._close()
        self._stage = None

    def _close(self) -> None:
        now = time.perf_counter()
        if self._stage is not None:
            self.updates[-1][self._stage] += now - self._since
        self._since = now


def watch(ppo_trainer, trainer, clock: StageClock) -> dict[str, int]:
    """Put marks around the calls of PPOTrainer.train. Returns a tally of optimizer steps, counted as they happen."""
    rollout, forward, get_reward = ppo_trainer.batch_generation, ppo_trainer.forward, ppo_trainer.get_reward
    tally = {"optimizer_steps": 0}

    def timed_rollout(*args, **kwargs):
        clock.begin_update("rollout")
        return rollout(*args, **kwargs)  # what follows until the reference (its own log-probs) is rollout too

    def timed_forward(model, *args, **kwargs):
        clock.mark("reference" if model is trainer.ref_model else "train")
        return forward(model, *args, **kwargs)

    def timed_reward(model, *args, **kwargs):
        clock.mark("reward" if model is trainer.reward_model else "value")
        result = get_reward(model, *args, **kwargs)
        clock.mark("other")
        return result

    log, step = trainer.log, trainer.optimizer.step

    def timed_log(*args, **kwargs):
        clock.mark("other")
        return log(*args, **kwargs)

    def counted_step(*args, **kwargs):
        tally["optimizer_steps"] += 1
        return step(*args, **kwargs)

    ppo_trainer.batch_generation, ppo_trainer.forward, ppo_trainer.get_reward = (
        timed_rollout,
        timed_forward,
        timed_reward,
    )
    trainer.log, trainer.optimizer.step = timed_log, counted_step
    return tally


def end_responses_at(policy, tokens_by_prompt: dict[tuple[int, ...], int]) -> None:
    """Make `policy.generate` end the response to each prompt after its own number of tokens; padding follows."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    class EndsAt(StoppingCriteria):
        eos_token_id = None  # its presence makes generate() pad the rows that have ended, as an end token would

        def __init__(self, ends_B: torch.Tensor) -> None:
            self.ends_B = ends_B

        def __call__(self, input_ids, scores, **kwargs):
            return cast(torch.BoolTensor, input_ids.shape[1] >= self.ends_B)

    generate = policy.generate

    def generate_ragged(input_ids, **kwargs):
        lengths = [tokens_by_prompt[tuple(row)] for row in input_ids.tolist()]
        ends_B = input_ids.shape[1] + torch.tensor(lengths, device=input_ids.device)
        return generate(input_ids=input_ids, stopping_criteria=StoppingCriteriaList([EndsAt(ends_B)]), **kwargs)

    policy.generate = generate_ragged


def build(args: argparse.Namespace, output_dir: str):
    """The trainer, and the response lengths by prompt (token ids)."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    dtype = getattr(torch, args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.model_dir, padding_side="left")
    rows = [json.loads(line) for line in args.prompts.read_text().splitlines()]
    ids = [tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] for row in rows]
    lengths = [row["response_tokens"] if args.ragged else args.response_tokens for row in rows]
    policy = AutoModelForCausalLM.from_pretrained(args.model_dir, dtype=dtype)
    policy.generation_config.suppress_tokens = [tokenizer.pad_token_id]
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    config = PPOConfig(
        output_dir=output_dir,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=1,
        num_mini_batches=args.batch_size // args.minibatch_size,
        num_ppo_epochs=args.inner_epochs,
        local_rollout_forward_batch_size=args.batch_size,
        total_episodes=args.batch_size * args.updates,
        response_length=args.response_tokens,
        stop_token=None,
        temperature=1.0,
        kl_coef=0.02,
        learning_rate=1e-5,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=1,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=AutoModelForCausalLM.from_pretrained(args.model_dir, dtype=dtype),
        reward_model=AutoModelForSequenceClassification.from_pretrained(args.reward_dir, dtype=dtype),
        value_model=AutoModelForSequenceClassification.from_pretrained(args.reward_dir, dtype=dtype),
        train_dataset=Dataset.from_dict({"input_ids": ids}),
    )
    return trainer, {tuple(prompt): length for prompt, length in zip(ids, lengths, strict=True)}


def main() -> None:
    args = parse_arguments()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch is imported
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    import torch
    import transformers
    import trl
    from trl.experimental.ppo import ppo_trainer

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as output_dir:
        trainer, tokens_by_prompt = build(args, output_dir)
        if args.ragged:
            end_responses_at(trainer.policy_model, tokens_by_prompt)
        clock = StageClock()
        tally = watch(ppo_trainer, trainer, clock)
        lengths = watch_lengths(ppo_trainer, trainer.processing_class.pad_token_id)
        cpu_before = time.process_time()
        started = time.perf_counter()
        trainer.train()
        clock.end()
        wall_s = time.perf_counter() - started
        cpu_s = time.process_time() - cpu_before
    wanted = [sorted(tokens_by_prompt.values())] * args.updates
    if [sorted(row) for row in lengths] != wanted:
        sys.exit(f"TRL's responses had lengths {lengths}, wanted {wanted[0]} at every update")
    rows = [dict(update) | {"update": sum(update.values())} for update in clock.updates]
    measured = rows[1:] or rows
    result = {
        "peer": f"TRL {trl.__version__} PPOTrainer",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__},
        "python": platform.python_version(),
        "dtype": args.dtype,
        "threads": args.threads,
        "ragged": args.ragged,
        "optimizer_steps_per_update": tally["optimizer_steps"] / args.updates,
        "response_tokens_per_update": sum(tokens_by_prompt.values()),
        "seconds": {stage: median(row.get(stage, 0.0) for row in measured) for stage in ("update", *STAGES)},
        "updates": rows,
        "cores_used": cpu_s / wall_s,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    args.out.write_text(json.dumps(result, indent=1))


def watch_lengths(ppo_trainer, pad_token_id: int) -> list[list[int]]:
    """Response lengths of every rollout from here on, as TRL sees them (up to the first padding token)."""
    rollout, seen = ppo_trainer.batch_generation, []

    def counted_rollout(model, queries, *args, **kwargs):
        query_responses, logits = rollout(model, queries, *args, **kwargs)
        seen.append((query_responses[:, queries.shape[1] :] != pad_token_id).sum(1).tolist())
        return query_responses, logits

    ppo_trainer.batch_generation = counted_rollout
    return seen


if __name__ == "__main__":
    main()
