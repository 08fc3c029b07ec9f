"""Samples of a run for people: text, and what the step knew of each token, in samples.jsonl of the run's folder.

Of every step its first episodes are kept, and each further one whose prompt is among those that step 1 began with: the
answers of step 1 are the SFT policy's own, so such a prompt has that answer to be compared with. Nothing of a run
depends on this file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from transformers import PreTrainedTokenizerBase

from trimtab.models.tokenizers import decode, decode_continuation
from trimtab.trainer.ppo.experience import Episode, Experience
from trimtab.trainer.ppo.update import Targets

SAMPLES = "samples.jsonl"
FIRST, AGAIN = 8, 8
"""Episodes of each step that are kept: its first ones, and most of those whose prompt step 1 began with."""
WATCHED_PROMPTS = 64
LONGEST = 512
"""Tokens of a sample that are kept one by one."""
TAIL_BYTES = 1 << 20


class SampleLog:
    """Appends the samples of each step."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self._path = folder / SAMPLES
        self._tokenizer = tokenizer
        self._watched = {row["prompt_id"] for row in read_rows(folder, 1)}

    def write(self, step: int, episodes: Sequence[Episode], experience: Experience, targets: Targets) -> None:
        """Keep some episodes of a step with KL (k1 against the reference, nats) and value of each response token."""
        prompts = [_prompt_id(episode) for episode in episodes]
        first = WATCHED_PROMPTS if step == 1 else FIRST
        if step == 1:
            self._watched = set(prompts[:first])
        again = [index for index in range(first, len(episodes)) if prompts[index] in self._watched]
        ends = np.cumsum(experience.lengths_B.numpy())
        kl_R = (targets.old_R.cpu() - experience.reference_R).numpy()
        values_R = targets.old_values_R.cpu().numpy()
        with self._path.open("a", encoding="utf-8") as lines:
            for index in (*range(min(first, len(episodes))), *again[:AGAIN]):
                end, count = int(ends[index]), len(episodes[index].completion.token_ids)
                span = slice(end - count, end - count + min(count, LONGEST))
                row = {"step": step, "prompt_id": prompts[index], **self._texts(episodes[index])}
                row |= {"kl_nats": _rounded(kl_R[span]), "values": _rounded(values_R[span])}
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _texts(self, episode: Episode) -> dict[str, Any]:
        completion = episode.completion
        return {
            "prompt": decode(self._tokenizer, completion.prompt_token_ids),
            "text": decode_continuation(self._tokenizer, completion.prompt_token_ids, completion.token_ids),
            "tokens": _pieces(self._tokenizer, completion.token_ids[:LONGEST]),
            "score": episode.score,
            "normalized_score": episode.normalized_score,
            "seed": completion.seed,
            "ended": completion.finish_reason == "stop",
        }


def read_rows(folder: Path, step: int) -> list[dict[str, Any]]:
    """The samples of one step; of the newest that has some with step 0."""
    return list(_rows(folder, step or _newest_step(folder)))


def newest_by_prompt(folder: Path, prompt_ids: set[str]) -> dict[str, dict[str, Any]]:
    """The newest sample of each of some prompts."""
    return {row["prompt_id"]: row for row in _rows(folder, 0) if row["prompt_id"] in prompt_ids}


def _rows(folder: Path, step: int) -> Iterator[dict[str, Any]]:
    """Whole rows in the order they were written; of one step, or of all with 0."""
    path = folder / SAMPLES
    if not path.exists():
        return
    prefix = f'{{"step": {step},' if step else "{"
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.startswith(prefix) and line.endswith("\n"):
                yield json.loads(line)


def _newest_step(folder: Path) -> int:
    """The step of the last whole row; 0 without one."""
    path = folder / SAMPLES
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        whole = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]
    last = whole[-1].decode() if whole else ""
    match = re.match(r'\{"step": (\d+),', last)
    return int(match[1]) if match else 0


def _prompt_id(episode: Episode) -> str:
    return blake3(episode.completion.prompt_token_ids.astype("<i4").tobytes()).hexdigest()[:16]


def _pieces(tokenizer: PreTrainedTokenizerBase, token_ids: np.ndarray) -> list[str]:
    """What each token adds to the text before it; a character of several tokens stands at its last one."""
    pieces, before = [], ""
    ids = token_ids.tolist()
    for end in range(1, len(ids) + 1):
        begin = max(0, end - 8)  # characters and merged spaces reach no further back
        before = str(tokenizer.decode(ids[begin : end - 1]))
        text = str(tokenizer.decode(ids[begin:end]))
        whole = text.startswith(before) and not text.endswith("\ufffd")
        pieces.append(text[len(before.rstrip("\ufffd")) :] if whole else "")
    return pieces


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in values]
