"""What `test_ranks.py` runs under torchrun: each stage's step by all ranks, and by one rank alone, compared.

Usage: torchrun --nproc-per-node N ranks_worker.py MODEL_FOLDER OUT.json
"""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from test_exact_kl import experience_of
from test_reward_loss import rankings
from test_sft import demonstrations

from trimtab.models.policy import Policy
from trimtab.models.scalar_head import ScalarModel
from trimtab.models.sharded import gathered, local, spread
from trimtab.trainer.forward import scaled_like
from trimtab.trainer.gather import save_gathered
from trimtab.trainer.moving_average import MovingAverage
from trimtab.trainer.optimizer import MasterWeightOptimizer, masters_of
from trimtab.trainer.ppo.pretraining import Pretraining
from trimtab.trainer.ppo.update import PpoUpdate
from trimtab.trainer.ranks import ALONE, Ranks
from trimtab.trainer.reward_loss import accumulate_pair_loss
from trimtab.trainer.sft import accumulate_nll, mean_nll
from trimtab.trainer.stages import OptimizerConfig, parse_stage
from trimtab.trainer.state import Checkpoints, TrainingState, restore_trained, trained_tensors
from trimtab.weights.digests import folder_digests
from trimtab.weights.folder import publishable_files

MICRO_BATCH_TOKENS = 24
RATE = 1e-3


class Trained:
    """A model and its optimizer on some ranks, with its first gradients kept."""

    def __init__(self, model: Policy | ScalarModel, ranks: Ranks, compute_dtype: str) -> None:
        ranks.shard(model.model, compute_dtype)
        self.model = model
        self.optimizer = MasterWeightOptimizer(model.model, OptimizerConfig(max_grad_norm=0.5), None, ranks)
        self.first: list[torch.Tensor] = []

    def note_gradients(self) -> None:
        """Keep the gradients that lie on the masters."""
        if not self.first:
            pairs = zip(self.optimizer.masters, self.optimizer.parameters, strict=True)
            zero = [m.grad if m.grad is not None else torch.zeros_like(m) for m, _ in pairs]
            self.first = [gathered(spread(g, p)).clone() for g, p in zip(zero, self.optimizer.parameters, strict=True)]

    def weights(self) -> list[torch.Tensor]:
        return [gathered(parameter) for parameter in self.model.model.parameters()]


def train_sft(folder: str, ranks: Ranks, dtype: str, compute_dtype: str, steps: int):
    trained = Trained(Policy.load(folder, dtype=dtype), ranks, compute_dtype)
    policy = trained.model
    assert isinstance(policy, Policy)
    average = MovingAverage(policy.model, trained.optimizer, 0.9)
    for step in range(steps):
        batch = [step % 6] if step % 5 == 4 else range(6)  # one sequence: the other rank is idle
        loss = accumulate_nll(policy, demonstrations(), batch, MICRO_BATCH_TOKENS, trained.optimizer)
        trained.note_gradients()
        norm = trained.optimizer.step(RATE)
        average.update()
    with average.in_the_model():
        held_out = mean_nll(policy, demonstrations(), MICRO_BATCH_TOKENS, ranks)
    return [trained], {"loss": loss, "norm": norm, "held_out": held_out}


def train_reward(folder: str, ranks: Ranks, dtype: str, compute_dtype: str, steps: int):
    model = ScalarModel.from_policy(Policy.load(folder, dtype=dtype), seed=1)
    _ = model.shares_beginnings
    trained = Trained(model, ranks, compute_dtype)
    for step in range(steps):
        batch = rankings(1 if step % 5 == 4 else 6, seed=step)
        result = accumulate_pair_loss(model, batch, MICRO_BATCH_TOKENS, trained.optimizer)
        trained.note_gradients()
        norm = trained.optimizer.step(RATE)
    return [trained], {"loss": result.loss, "accuracy": result.accuracy, "norm": norm}


def train_ppo(folder: str, ranks: Ranks, dtype: str, compute_dtype: str, steps: int):
    plain = Policy.load(folder, dtype=dtype)
    reference = Policy.load(folder, dtype=dtype)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for parameter in reference.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float32))
    experience = experience_of(plain, reference)
    policy = Policy.load(folder, dtype=dtype)
    both = [
        Trained(policy, ranks, compute_dtype),
        Trained(ScalarModel.from_policy(plain, seed=1), ranks, compute_dtype),
    ]
    values = {
        "stage": {"model": "m", "micro_batch_tokens": MICRO_BATCH_TOKENS},
        "prompts": "p",
        "batch_size": 8,
        "minibatch_size": 4,
        "kl": "exact_loss",
        "kl_loss_coefficient": 0.3,
    }
    update = PpoUpdate(
        parse_stage("ppo", values),  # type: ignore[arg-type]
        policy,
        both[0].optimizer,
        both[1].model,  # type: ignore[arg-type]
        both[1].optimizer,
        np.random.default_rng(0),
        reference_head=scaled_like(reference.head, plain.head),
    )
    update.pretraining = Pretraining(
        demonstrations(), coefficient=2.0, batch_size=3, micro_batch_tokens=MICRO_BATCH_TOKENS, seed=0
    )
    gradients = update._minibatch_gradients

    def noting(minibatch, targets, *, move_policy: bool):
        sums = gradients(minibatch, targets, move_policy=move_policy)
        for trained in both:
            trained.note_gradients()
        return sums

    update._minibatch_gradients = noting  # type: ignore[method-assign]
    for _ in range(max(1, steps // 2)):  # two minibatches each
        epoch = update.plan_epoch(experience)
        metrics = update.optimize(experience, epoch, update.fix_targets(experience, epoch, 0.02), RATE, RATE)
    return both, metrics


STAGES: dict[str, Callable] = {"sft": train_sft, "reward_model": train_reward, "ppo": train_ppo}


def compare(train: Callable, folder: str, ranks: Ranks, dtype: str, compute_dtype: str, steps: int) -> dict:
    """How far the ranks' gradients, weights and metrics are from those of one rank."""
    torch.manual_seed(0)
    ours, our_metrics = train(folder, ranks, dtype, compute_dtype, steps)
    sharded = [local(parameter).numel() for one in ours for parameter in one.optimizer.parameters]
    torch.manual_seed(0)
    alone, metrics = train(folder, ALONE, dtype, "float32", steps)
    gradients, weights = 0.0, 0.0
    for mine, whole in zip(ours, alone, strict=True):
        for got, want in zip(mine.first, whole.first, strict=True):
            gradients = max(gradients, float((got - want).norm() / want.norm().clamp(min=1e-12)))
        for got, want in zip(mine.weights(), whole.weights(), strict=True):
            weights = max(weights, float((got - want).abs().max()))
    return {
        "gradients": gradients,
        "weights": weights,
        "metrics": max(abs(our_metrics[k] - v) / max(1.0, abs(v)) for k, v in metrics.items()),
        "elements_held": sum(sharded),
        "elements": sum(parameter.numel() for one in alone for parameter in one.optimizer.parameters),
    }


def one_step(trained: Trained) -> list[torch.Tensor]:
    """The weights after one more step: they show the moments too."""
    policy = trained.model
    assert isinstance(policy, Policy)
    accumulate_nll(policy, demonstrations(), range(6), MICRO_BATCH_TOKENS, trained.optimizer)
    trained.optimizer.step(RATE)
    return trained.weights()


def reshard(folder: str, ranks: Ranks, there: Path) -> dict:
    """A checkpoint goes from several ranks to several and to one, and from one to several; what is left of it."""

    def fresh(of: Ranks) -> Trained:
        return Trained(Policy.load(folder), of, "float32")

    def save(trained: Trained, name: str, of: Ranks) -> None:
        tensors = {"policy": trained_tensors(trained.model.model, trained.optimizer)}
        Checkpoints(there / name, of).save(TrainingState(2, {"beta": 0.5}, tensors))

    def load(name: str, of: Ranks) -> Trained:
        trained, saved = fresh(of), Checkpoints(there / name, of).newest()
        assert saved is not None and saved.step == 2 and saved.values == {"beta": 0.5}
        restore_trained(trained.model.model, trained.optimizer, saved.tensors["policy"])
        return trained

    def difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
        return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))

    many, one = fresh(ranks), fresh(ALONE)
    for trained in (many, one):
        one_step(trained)
        one_step(trained)
    save(many, "many", ranks)
    if ranks.leads:
        save(one, "one", ALONE)
    ranks.meet()
    after = one_step(many)
    return {
        "many to many": difference(one_step(load("many", ranks)), after),
        "many to one": difference(one_step(load("many", ALONE)), after),
        "one to many": difference(one_step(load("one", ranks)), one_step(one)),
        "files": sorted(path.name for path in there.glob("many/*/*")),
    }


def publish(folder: str, ranks: Ranks, there: Path) -> dict:
    """The digests of a model's folder, written by several ranks and by one; in one file and in many."""
    found = {}
    for kind, compute_dtype in (("policy", "float32"), ("policy", "bfloat16"), ("reward", "float32")):
        policy = Policy.load(folder)
        model = ScalarModel.from_policy(policy, seed=1) if kind == "reward" else policy
        alone = there / f"{kind}-{compute_dtype}"
        if ranks.leads:
            whole = copy.deepcopy(model.model)
            masters_of(whole, compute_dtype)
            whole.save_pretrained(alone)
            model.tokenizer.save_pretrained(alone)
        ranks.shard(model.model, compute_dtype)
        for name, size_bytes in (("whole", 1 << 30), ("pieces", 4096)):
            out = there / f"{kind}-{compute_dtype}-{name}"
            out.mkdir(exist_ok=True)
            save_gathered(model, out, ranks, size_bytes)
            if ranks.leads:
                files = [sorted(entry.name for entry in publishable_files(one)) for one in (alone, out)]
                digests = [folder_digests(one, names)[0] for one, names in zip((alone, out), files, strict=True)]
                settings = [(one / "config.json").read_text() for one in (alone, out)]
                found[out.name] = {
                    "tensors": set(digests[0]) == set(digests[1]),
                    "config": settings[0] == settings[1],
                    "files": len(list(out.glob("*.safetensors"))),
                }
    return found


def main() -> None:
    folder, out = sys.argv[1:]
    ranks = Ranks.join("cpu")
    found = {
        name: {
            "float32": compare(train, folder, ranks, "float32", "float32", 1),
            "float64": compare(train, folder, ranks, "float64", "float32", 20),
        }
        for name, train in STAGES.items()
    }
    there = Path(out).parent
    found["checkpoints"] = reshard(folder, ranks, there)
    found["folders"] = publish(folder, ranks, there)
    if ranks.leads:
        Path(out).write_text(json.dumps(found))
    ranks.leave()


if __name__ == "__main__":
    main()
