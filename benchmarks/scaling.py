"""How the cost of a step grows: seconds against prompts, tokens, parameters, K and replicas, with fitted exponents.

    python -m benchmarks.scaling --out scaling.json [--plot scaling.png] [--doublings 5]

One quantity is doubled at a time, the rest stays. Prompts, tokens and parameters are those of a PPO update (old
log-probs and values, advantages, an epoch of one minibatch, policy and value model); K is that of a reward-model step;
replicas are those of generator, reward and reference while a batch is sampled and scored (scaling_replicas.py).
cost ~ quantity^exponent is fitted by least squares of the logs over the larger half of the sizes, where fixed costs
weigh least; each cost is the median of repeats. Models are random Llamas: cost does not depend on weights.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.machine import describe_machine
from benchmarks.scaling_replicas import rollout_seconds
from trimtab.models.policy import Policy
from trimtab.models.scalar_head import ScalarModel
from trimtab.trainer.data import TokenizedRanking, TokenSequence
from trimtab.trainer.forward import TokenBatch
from trimtab.trainer.optimizer import MasterWeightOptimizer
from trimtab.trainer.ppo.experience import Experience
from trimtab.trainer.ppo.update import PpoUpdate
from trimtab.trainer.reward_loss import accumulate_pair_loss
from trimtab.trainer.stages import OptimizerConfig, parse_stage

VOCABULARY = 2048
PROMPT_TOKENS = 16
REPLICA_DOUBLINGS = 3


@dataclass(frozen=True)
class Size:
    """What one measurement has; `width` is the hidden size of a model of four layers."""

    prompts: int = 16
    tokens: int = 32
    width: int = 128
    k: int = 4


@dataclass(frozen=True)
class Curve:
    """Median seconds at each size of one quantity, and the exponent of its growth."""

    quantity: str
    sizes: list[int]
    seconds: list[float]
    exponent: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("scaling.json"))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--doublings", type=int, default=3, help="of each quantity, from its smallest size")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        curves = measure(Path(scratch), doublings=arguments.doublings, repeats=arguments.repeats)
    report = {"machine": asdict(describe_machine()), "threads": arguments.threads, "base": asdict(Size())}
    arguments.out.write_text(json.dumps(report | {"curves": [asdict(curve) for curve in curves]}, indent=1) + "\n")
    for curve in curves:
        sizes = ", ".join(f"{n}: {s:.3f} s" for n, s in zip(curve.sizes, curve.seconds, strict=True))
        print(f"{curve.quantity:<10} exponent {curve.exponent:.2f}   ({sizes})")
    if arguments.plot:
        draw(curves, arguments.plot)


def measure(scratch: Path, *, doublings: int, repeats: int) -> list[Curve]:
    """One curve a quantity."""
    base = Size()
    steps = [2**power for power in range(doublings + 1)]
    return [
        curve("prompts", [replace(base, prompts=8 * n) for n in steps], ppo_update, scratch, repeats),
        curve("tokens", [replace(base, tokens=16 * n) for n in steps], ppo_update, scratch, repeats),
        curve("parameters", [replace(base, width=64 * n) for n in steps], ppo_update, scratch, repeats),
        curve("K", [replace(base, k=2 * n) for n in steps], reward_step, scratch, repeats),
        replica_curve([2**power for power in range(REPLICA_DOUBLINGS + 1)]),
    ]


def replica_curve(replicas: Sequence[int]) -> Curve:
    """The rollouts of a batch with more and more replicas."""
    seconds = [rollout_seconds(count) for count in replicas]
    return Curve("replicas", list(replicas), seconds, exponent(replicas, seconds))


def curve(
    quantity: str,
    sizes: Sequence[Size],
    prepare: Callable[[Size, Path], tuple[int, Callable[[], object]]],
    scratch: Path,
    repeats: int,
) -> Curve:
    """Measure each size; `prepare` gives the model's parameter count and the work to time."""
    xs: list[int] = []
    seconds: list[float] = []
    for size in sizes:
        parameters, work = prepare(size, scratch)
        work()  # not counted: first touches of memory
        seconds.append(median(_seconds(work) for _ in range(repeats)))
        xs.append(parameters if quantity == "parameters" else getattr(size, quantity.lower()))
    return Curve(quantity, xs, seconds, exponent(xs, seconds))


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """The slope of log cost over log size, over the larger half of the sizes (at least two)."""
    count = _fitted(len(sizes))
    return float(np.polyfit(np.log(sizes[-count:]), np.log(seconds[-count:]), 1)[0])


def _fitted(count: int) -> int:
    return max(2, (count + 1) // 2)


def ppo_update(size: Size, scratch: Path) -> tuple[int, Callable[[], object]]:
    """A PPO update of both models."""
    policy = make_policy(size.width, scratch)
    value = ScalarModel.from_policy(policy, seed=0)
    values = {"stage": {"model": "m"}, "prompts": "p", "batch_size": size.prompts, "minibatch_size": size.prompts}
    first, second = (MasterWeightOptimizer(one.model, OptimizerConfig()) for one in (policy, value))
    update = PpoUpdate(
        parse_stage("ppo", values),  # type: ignore[arg-type]
        policy,
        first,
        value,
        second,
        np.random.default_rng(0),
    )
    experience = make_experience(size)

    def work() -> None:
        epoch = update.plan_epoch(experience)
        update.optimize(experience, epoch, update.fix_targets(experience, epoch, 0.02), 1e-6, 1e-6)

    return policy.parameter_count, work


def reward_step(size: Size, scratch: Path) -> tuple[int, Callable[[], object]]:
    """A reward-model step over as many prompts, K responses to each."""
    model = ScalarModel.from_policy(make_policy(size.width, scratch), seed=0)
    optimizer = MasterWeightOptimizer(model.model, OptimizerConfig())
    random = np.random.default_rng(0)
    batch = []
    for _ in range(size.prompts):
        prompt = _tokens(random, PROMPT_TOKENS)
        responses = [np.concatenate([prompt, _tokens(random, size.tokens)]) for _ in range(size.k)]
        sequences = tuple(TokenSequence(response, PROMPT_TOKENS) for response in responses)
        batch.append(TokenizedRanking(sequences, np.arange(1, size.k + 1), "someone", "task"))

    def work() -> None:
        accumulate_pair_loss(model, batch, 8192, optimizer)
        optimizer.step(1e-6)

    return model.parameter_count, work


def make_policy(width: int, scratch: Path) -> Policy:
    """A random Llama of four layers, its tokenizer made of numbered words."""
    folder = scratch / f"width-{width}"
    if not folder.exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=4096,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        words = models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0")
        tokenizer = Tokenizer(words)
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1").save_pretrained(folder)
    return Policy.load(str(folder))


def make_experience(size: Size) -> Experience:
    """Random episodes of equal lengths."""
    random = np.random.default_rng(0)
    sequences = tuple(_tokens(random, PROMPT_TOKENS + size.tokens) for _ in range(size.prompts))
    logprobs = torch.full((size.prompts * size.tokens,), -7.6)
    scores = torch.linspace(-1, 1, size.prompts)
    tokens = TokenBatch(sequences, (PROMPT_TOKENS,) * size.prompts)
    return Experience(tokens, logprobs, logprobs.clone(), scores, scores, torch.ones(size.prompts).bool())


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Seconds over size, both axes logarithmic, with the fitted line."""
    from trimtab.rounds.plot_style import ACCENT, AFTER, STYLE  # chooses matplotlib's backend

    from matplotlib import pyplot  # isort: skip

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, len(curves), figsize=(2.8 * len(curves), 2.7), layout="constrained")
        for axis, one in zip(axes, curves, strict=True):
            fitted = np.array(one.sizes[-_fitted(len(one.sizes)) :], float)
            middle = np.exp(np.mean(np.log(one.seconds[-len(fitted) :])) - one.exponent * np.mean(np.log(fitted)))
            axis.loglog(one.sizes, one.seconds, "o", color=AFTER)
            axis.loglog(fitted, middle * fitted**one.exponent, color=ACCENT)
            axis.minorticks_off()
            axis.set_xticks(one.sizes, [_short(size) for size in one.sizes], fontsize="x-small")
            ticks = [
                tick for tick in (m * 10.0**p for p in range(-3, 3) for m in (1, 2, 5)) if _within(tick, one.seconds)
            ]
            axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.set_title(f"{one.quantity}: {one.exponent:.2f}")
            axis.set_xlabel(one.quantity)
        axes[0].set_ylabel("seconds a step")
        figure.savefig(path)
        pyplot.close(figure)


def _short(size: int) -> str:
    return f"{size / 1e6:.{0 if size >= 1e7 else 1}f}M" if size >= 1e5 else str(size)


def _within(tick: float, seconds: Sequence[float]) -> bool:
    return min(seconds) / 1.3 <= tick <= max(seconds) * 1.3


def _tokens(random: np.random.Generator, count: int) -> np.ndarray:
    return random.integers(2, VOCABULARY, count).astype(np.int32)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
