"""What the reward servers are asked: models in folders, texts of about 96 tokens, and the bare forward beside them.

    python -m benchmarks.reward_serving_work --model FOLDER --texts texts.jsonl --dtype bfloat16 --batch 64

times transformers' own padded forward of that folder in this process and prints JSON: sequences a second, and scores.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.models import Work, write_work

STORIES = Path(__file__).parents[1] / "examples" / "models" / "stories260K-hf"
WORDS = [
    "the",
    "a",
    "little",
    "girl",
    "boy",
    "dog",
    "cat",
    "saw",
    "went",
    "to",
    "park",
    "happy",
    "sad",
    "big",
    "red",
    "ball",
    "tree",
    "mom",
    "said",
    "and",
    "was",
    "very",
    "then",
    "they",
]


@dataclass(frozen=True)
class Texts:
    """How many texts, and how many tokens each has: uniform between the two."""

    count: int = 512
    shortest_tokens: int = 72
    longest_tokens: int = 120
    seed: int = 96


def write_6m(root: Path) -> Path:
    """The 6-million-parameter Llama with a score head of `benchmarks.models`, and a tokenizer of one word a token."""
    return write_work(root, Work(prompt_tokens=64, response_tokens=64)).reward


def write_260k(root: Path) -> Path:
    """The 260-thousand-parameter story model of examples/ under a fresh score head."""
    from trimtab.models.policy import Policy
    from trimtab.models.scalar_head import ScalarModel

    if not (root / "config.json").exists():
        model = ScalarModel.from_policy(Policy.load(str(STORIES)), seed=1)
        if model.model.config.pad_token_id is None:
            model.model.config.pad_token_id = model.eos_token_ids[0]
        if model.tokenizer.pad_token is None:
            model.tokenizer.pad_token = model.tokenizer.eos_token
        model.save(root)
    return root


def write_260k_wide_heads(root: Path) -> Path:
    """A random Llama with a score head of that model's size, but 2 heads 32 wide: vLLM has none 8 wide on a CPU."""
    shape = Work(hidden_size=64, layers=5, heads=2, intermediate_size=172, prompt_tokens=64, response_tokens=64)
    return write_work(root, shape).reward


def write_texts(path: Path, model: Path, texts: Texts) -> Path:
    """Texts that the model's tokenizer makes about that many tokens of; JSONL, a text a line."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rng = np.random.default_rng(texts.seed)
    own_words = [word for word in tokenizer.get_vocab() if word[:1] == "w" and word[1:].isdigit()]
    words = own_words or WORDS
    lines = []
    for wanted in rng.integers(texts.shortest_tokens, texts.longest_tokens + 1, texts.count):
        chosen = [words[i] for i in rng.integers(0, len(words), int(wanted))]
        while len(chosen) > 1 and len(tokenizer.encode(" ".join(chosen))) > wanted:
            chosen.pop()
        lines.append(json.dumps(" ".join(chosen)))
    path.write_text("\n".join(lines) + "\n")
    return path


def bare_forward(model_folder: Path, texts: list[str], *, dtype: str, batch: int, seconds: float) -> dict:
    """transformers' padded forward, tokenized beforehand: by the median batch sequences a second,
    milliseconds a batch and CPU milliseconds a sequence; and scores by text.

    Batches are of the texts in their order, as they would come, padded to the longest of each.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    model = AutoModelForSequenceClassification.from_pretrained(model_folder, dtype=getattr(torch, dtype)).eval()
    batches = [
        tokenizer(texts[start : start + batch], return_tensors="pt", padding=True, return_token_type_ids=False)
        for start in range(0, len(texts) - batch + 1, batch)
    ]
    times_s, cpu_s, scores = [], [], {}
    with torch.inference_mode():
        model(**batches[0])
        ends = time.perf_counter() + seconds
        turn = 0
        while time.perf_counter() < ends or turn < 3:
            number = turn % len(batches)
            started, cpu_started = time.perf_counter(), time.process_time()
            logits = model(**batches[number]).logits
            times_s.append(time.perf_counter() - started)
            cpu_s.append(time.process_time() - cpu_started)
            for place, score in enumerate(logits[:, 0].tolist()):
                scores[str(number * batch + place)] = score
            turn += 1
    return {
        "per_second": batch / float(np.median(times_s)),
        "ms": float(np.median(times_s)) * 1e3,
        "cpu_ms": float(np.median(cpu_s)) * 1e3 / batch,
        "scores": scores,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args()
    texts = [json.loads(line) for line in args.texts.read_text().splitlines()]
    print(json.dumps(bare_forward(args.model, texts, dtype=args.dtype, batch=args.batch, seconds=args.seconds)))


if __name__ == "__main__":
    main()
