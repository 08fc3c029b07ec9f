"""A finished episode as bytes in the journal, and back: what a resume needs to train on it without asking a service.

A JSON line (numbers, versions, each array's name, dtype and shape), then the arrays' bytes one after another.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from trimtab.trainer.ppo.experience import Episode
from trimtab_client import Completion, ModelVersion, VersionRun


def pack_episode(episode: Episode) -> bytes:
    """An episode with its scores and reference log-probs as bytes, bit for bit."""
    completion = episode.completion
    arrays = {
        "prompt": completion.prompt_token_ids,
        "tokens": completion.token_ids,
        "logprobs": completion.logprobs,
        "reference": episode.reference_logprobs,
        "hidden": episode.reference_hidden,
    }
    present = {name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None}
    head = {
        "prompt_index": completion.prompt_index,
        "sample_index": completion.sample_index,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "seed": completion.seed,
        "versions": [
            [run.version.run_id, run.version.name, run.version.step, run.version.digest, run.token_count]
            for run in completion.versions
        ],
        "score": episode.score,
        "normalized_score": episode.normalized_score,
        "gold_score": episode.gold_score,
        "arrays": [[name, array.dtype.str, array.shape] for name, array in present.items()],
    }
    return json.dumps(head).encode() + b"\n" + b"".join(array.tobytes() for array in present.values())


def unpack_episode(data: bytes) -> Episode:
    """The episode that `pack_episode` was given."""
    line, _, rest = data.partition(b"\n")
    head: dict[str, Any] = json.loads(line)
    arrays: dict[str, np.ndarray] = {}
    position = 0
    for name, dtype, shape in head["arrays"]:
        count = int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(rest, np.dtype(dtype), count, position).reshape(shape).copy()
        position += arrays[name].nbytes
    completion = Completion(
        prompt_index=head["prompt_index"],
        sample_index=head["sample_index"],
        prompt_token_ids=arrays["prompt"],
        token_ids=arrays["tokens"],
        logprobs=arrays["logprobs"],
        text=head["text"],
        finish_reason=head["finish_reason"],
        versions=tuple(VersionRun(ModelVersion(*version), count) for *version, count in head["versions"]),
        seed=head["seed"],
    )
    return Episode(
        completion,
        head["score"],
        head["normalized_score"],
        arrays.get("reference"),
        arrays.get("hidden"),
        head.get("gold_score"),
    )
