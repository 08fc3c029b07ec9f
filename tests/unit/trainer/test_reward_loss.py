"""The reward model's loss: all untied pairs from K forwards, weight 1 a prompt."""

import itertools
import math
from contextlib import closing

import numpy as np
import pytest
import torch

from trimtab.models.policy import Policy
from trimtab.models.scalar_head import ScalarModel
from trimtab.trainer.data import TokenizedRanking, TokenSequence
from trimtab.trainer.optimizer import MasterWeightOptimizer
from trimtab.trainer.rankings import plan_ranking_batches, score_rankings, untied_pairs
from trimtab.trainer.reward_loss import accumulate_pair_loss, ranking_loss
from trimtab.trainer.side_by_side import SideBySide
from trimtab.trainer.stages import OptimizerConfig


def one_by_one(scores, ranks):
    losses = [
        math.log1p(math.exp(-(scores[a] - scores[b])))
        for a, b in itertools.permutations(range(len(ranks)), 2)
        if ranks[a] < ranks[b]
    ]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("ranks", [[1, 2], [2, 1, 3, 3], [1, 1, 2, 3, 3, 4, 5, 6, 6]])
def test_loss_equals_the_mean_over_untied_pairs_one_by_one(ranks):
    scores = torch.randn(len(ranks), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss, _ = ranking_loss(scores, np.array(ranks))
    assert float(loss) == pytest.approx(one_by_one(scores.tolist(), ranks), rel=1e-12)


def test_permuting_responses_changes_nothing():
    ranks, scores = np.array([3, 1, 2, 2, 4]), torch.randn(5, dtype=torch.float64)
    order = np.random.default_rng(0).permutation(5)
    torch.testing.assert_close(ranking_loss(scores, ranks)[0], ranking_loss(scores[order], ranks[order])[0])


def test_ties_give_no_gradient():
    scores = torch.randn(4, requires_grad=True)
    ranking_loss(scores, np.array([1, 1, 1, 2]))[0].backward()
    torch.testing.assert_close(scores.grad.sum(), torch.tensor(0.0), atol=1e-7, rtol=0)
    pair = torch.randn(2, requires_grad=True)
    assert len(untied_pairs(np.array([2, 2]))[0]) == 0 and pair.grad is None


def rankings(count=6, seed=0):
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        k = int(random.integers(2, 6))
        sequences = tuple(
            TokenSequence(random.integers(3, 48, random.integers(3, 14)).astype(np.int32), 1) for _ in range(k)
        )
        ranks = np.concatenate([[1, 2], random.integers(1, 4, k - 2)])
        made.append(TokenizedRanking(sequences, ranks, "someone", f"task {number}"))
    return made


def test_gradients_do_not_depend_on_micro_batches(tiny_folder):
    def gradients(tokens):
        model = ScalarModel.from_policy(Policy.load(str(tiny_folder)), seed=0)
        optimizer = MasterWeightOptimizer(model.model, OptimizerConfig())
        loss = accumulate_pair_loss(model, rankings(), tokens, optimizer).loss
        return loss, [p.grad for p in model.model.parameters()]

    (loss_a, grads_a), (loss_b, grads_b) = gradients(30), gradients(100_000)
    assert loss_a == pytest.approx(loss_b, rel=1e-6)
    for a, b in zip(grads_a, grads_b, strict=True):
        assert float((a - b).norm()) <= 1e-5 * float(b.norm()) + 1e-9


def test_an_embeddings_gradient_holds_the_rows_that_were_read_and_steps_as_a_dense_one_does(tiny_folder):
    def stepped(*, sparse: bool) -> list[torch.Tensor]:
        model = ScalarModel.from_policy(Policy.load(str(tiny_folder)), seed=0)
        optimizer = MasterWeightOptimizer(model.model, OptimizerConfig())
        embedding = model.model.get_input_embeddings()
        if not sparse:
            embedding.sparse = False
        for tokens in (20, 100_000):
            accumulate_pair_loss(model, rankings(2), tokens, optimizer)
            assert embedding.weight.grad.is_sparse == sparse
            optimizer.step(1e-3)
        return [parameter.detach() for parameter in model.model.parameters()]

    for ours, dense in zip(stepped(sparse=True), stepped(sparse=False), strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-6)


def test_two_ways_at_a_time_give_the_gradients_of_one_and_the_same_again(tiny_folder):
    def gradients(ways):
        model = ScalarModel.from_policy(Policy.load(str(tiny_folder)), seed=0)
        optimizer = MasterWeightOptimizer(model.model, OptimizerConfig())
        result = accumulate_pair_loss(model, rankings(9), 100_000, optimizer, ways)
        return result, torch.cat([p.grad.to_dense().flatten() for p in model.model.parameters()])

    with closing(SideBySide("cpu", threads=2)) as both:
        (result, grads), (again, grads_again) = gradients(both), gradients(both)
    expected, expected_grads = gradients(None)
    assert torch.equal(grads, grads_again) and result == again
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert result.accuracy == pytest.approx(expected.accuracy)
    assert float((grads - expected_grads).norm()) <= 1e-5 * float(expected_grads.norm())


def test_micro_batches_keep_rankings_whole():
    sizes = [30, 20, 11, 80, 5, 5]
    assert plan_ranking_batches(sizes, 60) == [[0, 1], [2], [3], [4, 5]]


def test_scores_do_not_depend_on_batch_mates(tiny_folder):
    model = ScalarModel.from_policy(Policy.load(str(tiny_folder)), seed=0)
    made = rankings()
    with torch.no_grad():
        together = score_rankings(model, made)
        alone = [score_rankings(model, [ranking])[0] for ranking in made]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_head_starts_with_deviation_one_over_root_d_plus_one(tiny_folder):
    policy = Policy.load(str(tiny_folder))
    weights = torch.cat([ScalarModel.from_policy(policy, seed=s).model.score.weight.flatten() for s in range(64)])
    assert float(weights.detach().std()) == pytest.approx(33**-0.5, rel=0.05)
