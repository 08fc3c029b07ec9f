"""The benchmark's work as files: random policy and reward models, their tokenizer, prompts with response lengths.

Everything is made locally from one seed, so that every side of a comparison reads the same folders and nothing is
downloaded. The models are untrained: good for timing, meaningless as language models. Both sides read these folders
with `from_pretrained`, and `prompts.jsonl` row by row.

    python -m benchmarks.models --out /tmp/ppo-work
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
SPECIAL_TOKENS = (PAD, EOS, UNK)


@dataclass(frozen=True)
class Work:
    """The model's shape and the batch of one PPO update; lengths in tokens."""

    vocab_size: int = 512
    hidden_size: int = 288
    layers: int = 6
    heads: int = 6
    intermediate_size: int = 768
    prompts: int = 64
    prompt_tokens: int = 32
    response_tokens: int = 64
    shortest_response_tokens: int = 8
    inner_epochs: int = 4
    minibatch_size: int = 16
    seed: int = 20_260

    @property
    def longest_tokens(self) -> int:
        return self.prompt_tokens + self.response_tokens


@dataclass(frozen=True)
class WorkFolder:
    """Where one Work lies on disk. `prompts` rows: {"prompt": text of exactly prompt_tokens words,
    "response_tokens": the length its response has in the ragged case}."""

    work: Work
    policy: Path
    reward: Path
    prompts: Path

    @property
    def response_lengths_B(self) -> tuple[int, ...]:
        """The ragged case's response length of each prompt, in the order of the file."""
        return tuple(json.loads(row)["response_tokens"] for row in self.prompts.read_text().splitlines())


def write_work(root: Path, work: Work) -> WorkFolder:
    """Write (or reuse, if this very Work is already there) the models, tokenizer and prompts under `root`."""
    folder = WorkFolder(work, root / "policy", root / "reward", root / "prompts.jsonl")
    stamp = root / "work.json"
    wanted = json.dumps(asdict(work), indent=1)
    if stamp.exists() and stamp.read_text() == wanted:
        return folder
    root.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    write_models(folder)
    write_prompts(folder)
    stamp.write_text(wanted)  # last: its presence says the rest is whole
    return folder


def write_models(folder: WorkFolder) -> None:
    """Save the policy and the one-label reward model (the value model starts from it too) with their tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    work = folder.work
    tokenizer = word_tokenizer(work)
    shape = {
        "vocab_size": work.vocab_size,
        "hidden_size": work.hidden_size,
        "num_hidden_layers": work.layers,
        "num_attention_heads": work.heads,
        "num_key_value_heads": work.heads,
        "intermediate_size": work.intermediate_size,
        "max_position_embeddings": max(256, work.longest_tokens),
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    torch.manual_seed(work.seed)
    policy = LlamaForCausalLM(LlamaConfig(**shape))
    torch.manual_seed(work.seed + 1)
    reward_config = LlamaConfig(**shape)
    reward_config.num_labels = 1
    reward = LlamaForSequenceClassification(reward_config)
    for model, path in ((policy, folder.policy), (reward, folder.reward)):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)


def word_tokenizer(work: Work):
    """A word-level tokenizer whose words are w3 … w511: a text of n words is exactly n tokens, nothing is added."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    words |= {f"w{index}": index for index in range(len(SPECIAL_TOKENS), work.vocab_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        model_max_length=max(256, work.longest_tokens),
    )


def write_prompts(folder: WorkFolder) -> None:
    """Distinct random prompts; the ragged case's lengths are uniform between the shortest and the longest."""
    work = folder.work
    rng = np.random.default_rng(work.seed + 2)
    words_BT = rng.integers(len(SPECIAL_TOKENS), work.vocab_size, (work.prompts, work.prompt_tokens))
    lengths_B = rng.integers(work.shortest_response_tokens, work.response_tokens + 1, work.prompts)
    rows = (
        json.dumps({"prompt": " ".join(f"w{index}" for index in words), "response_tokens": int(length)})
        for words, length in zip(words_BT, lengths_B, strict=True)
    )
    folder.prompts.write_text("\n".join(rows) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=Work.vocab_size)
    parser.add_argument("--seed", type=int, default=Work.seed)
    args = parser.parse_args()
    print(write_work(args.out, Work(vocab_size=args.vocab_size, seed=args.seed)))


if __name__ == "__main__":
    main()
