"""Scorers of answers: judges that evaluate, and gold functions that drive a simulated labeler. Higher is better.

Written as one line of text, in recipes and on the command line:

    vader                    compound sentiment of the text, −1 to 1 (Hutto & Gilbert 2014)
    sentences:FILE           log-odds by a `judge` file: a logistic regression on sentence vectors
    words:happy,glad         how many words of the answer are in the list
    reward:SOURCE            raw score of a reward model: a folder, a hub id or version:RUN/NAME[@STEP]

The first two read prompt and answer as one text, since an answer continues its prompt.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trimtab.rounds.evaluate import words

KINDS = ("vader", "sentences", "words", "reward")
SCORE_TIMEOUT_S = 900.0

WirePrompt = str | list[dict[str, str]]
"""A prompt as the client sends it: text, or chat messages."""

ServeReward = Callable[[str], str]
"""Model source → address of a reward service that serves it."""


class ScorerError(ValueError):
    """A scorer that cannot be made; the message says what to write or install."""


@dataclass(frozen=True)
class Scorer:
    """`score(prompts, answers)` → float64 [B]; `spec` is how it was written."""

    spec: str
    score: Callable[[Sequence[WirePrompt], Sequence[str]], np.ndarray]


def check_spec(spec: str) -> tuple[str, str]:
    """(kind, argument) of a scorer's text; ScorerError where it is none."""
    kind, colon, argument = spec.partition(":")
    if kind not in KINDS or (kind == "vader") == bool(colon) or (kind != "vader" and not argument.strip()):
        raise ScorerError(f"{spec!r} is no scorer: write vader, sentences:FILE, words:A,B,… or reward:SOURCE")
    return kind, argument


def spec_with_paths(spec: str, folder: Path) -> str:
    """The same scorer with a file or folder that is named relative to `folder` by its absolute path."""
    kind, argument = check_spec(spec)
    path = folder / argument
    return f"{kind}:{path.resolve()}" if kind in ("sentences", "reward") and path.exists() else spec


def open_scorer(spec: str, serve_reward: ServeReward, stack: ExitStack) -> Scorer:
    """Make a scorer; a reward model is served by `serve_reward`, its client closed with `stack`.

    Raises:
        ScorerError: it is no scorer, or what it needs is not installed.
    """
    kind, argument = check_spec(spec)
    if kind == "vader":
        return Scorer(spec, _vader())
    if kind == "words":
        return Scorer(spec, _word_counter(frozenset(word.strip().lower() for word in argument.split(","))))
    if kind == "sentences":
        return Scorer(spec, _sentences(Path(argument)))
    return Scorer(spec, _reward_model(serve_reward(argument), stack))


def whole_text(prompt: WirePrompt, answer: str) -> str:
    """What a reader of texts sees: the prompt with its continuation, or the answer alone in a conversation."""
    return prompt + answer if isinstance(prompt, str) else answer


def _vader() -> Callable[[Sequence[WirePrompt], Sequence[str]], np.ndarray]:
    try:
        module = importlib.import_module("vaderSentiment.vaderSentiment")
    except ImportError as error:
        raise ScorerError("the scorer vader needs a package: pip install vaderSentiment==3.3.2") from error
    analyzer = module.SentimentIntensityAnalyzer()

    def score(prompts: Sequence[WirePrompt], answers: Sequence[str]) -> np.ndarray:
        texts = [whole_text(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        return np.array([analyzer.polarity_scores(text)["compound"] for text in texts], np.float64)

    return score


def _word_counter(wanted: frozenset[str]) -> Callable[[Sequence[WirePrompt], Sequence[str]], np.ndarray]:
    def score(prompts: Sequence[WirePrompt], answers: Sequence[str]) -> np.ndarray:
        return np.array([sum(word in wanted for word in words(answer)) for answer in answers], np.float64)

    return score


def _sentences(file: Path) -> Callable[[Sequence[WirePrompt], Sequence[str]], np.ndarray]:
    from trimtab.rounds.judge import Judge, SentenceEncoder

    if not file.is_file():
        raise ScorerError(f"{file} is not there; `sentences:` needs a file that a judge was saved to")
    judge = Judge.load(file, SentenceEncoder.load())

    def score(prompts: Sequence[WirePrompt], answers: Sequence[str]) -> np.ndarray:
        return judge.log_odds([whole_text(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)])

    return score


def _reward_model(address: str, stack: ExitStack) -> Callable[[Sequence[WirePrompt], Sequence[str]], np.ndarray]:
    from trimtab_client import ChannelOptions, RewardClient

    client = stack.enter_context(RewardClient(address, ChannelOptions(timeout_s=SCORE_TIMEOUT_S)))

    def score(prompts: Sequence[WirePrompt], answers: Sequence[str]) -> np.ndarray:
        pairs = list(zip(prompts, answers, strict=True))
        chats = [i for i, (prompt, _) in enumerate(pairs) if not isinstance(prompt, str)]
        texts = [i for i, (prompt, _) in enumerate(pairs) if isinstance(prompt, str)]
        scores_B = np.zeros(len(pairs), np.float64)
        if texts:
            scores_B[texts] = client.score_texts([(str(pairs[i][0]), pairs[i][1]) for i in texts]).scores
        if chats:
            conversations = [[*pairs[i][0], {"role": "assistant", "content": pairs[i][1]}] for i in chats]
            scores_B[chats] = client.score_chats(conversations).scores  # type: ignore[arg-type]
        return scores_B

    return score
