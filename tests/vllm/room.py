"""A generator process on vLLM, its callers, and small models that vLLM serves on a CPU (heads of 32)."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from trimtab.generator.config import GeneratorConfig
from trimtab.generator.engine import Sampling, SequenceRequest
from trimtab.generator.loading import load_policy
from trimtab.generator.local.scheduler import LocalEngine
from trimtab_client import GeneratorClient, ModelVersion

VOCAB_SIZE = 259
MAX_LENGTH = 512
START_S = 840.0
CALL_S = 120.0
SMALL = {"eager": True, "kv_cache_gib": 0.25}


def llama(*, tied: bool = False) -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=MAX_LENGTH, bos_token_id=256, eos_token_id=257,
        tie_word_embeddings=tied,
    )  # fmt: skip


def save_policy(folder: Path, seed: int, config: PretrainedConfig | None = None) -> Path:
    """A random policy with a byte-level tokenizer."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config or llama())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_reward(folder: Path, seed: int) -> Path:
    """A random reward model with the same tokenizer."""
    torch.manual_seed(seed)
    config = llama()
    config.num_labels, config.pad_token_id = 1, 258
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Bytes as tokens, and three more."""
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    backend.add_special_tokens(["<s>", "</s>", "<pad>"])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def settings_of(model: str | Path, **settings: Any) -> dict[str, Any]:
    return {
        "engine": "vllm", "vllm": SMALL, "model": str(model), "port": 0, "metrics_port": None, "threads": 1,
        "prefill_tokens": 256, "max_slots": 8, **settings,
    }  # fmt: skip


@dataclass
class Served:
    """A running generator process."""

    address: str
    process: subprocess.Popen[bytes]
    log: Path

    def client(self) -> GeneratorClient:
        return GeneratorClient(self.address)


@contextmanager
def serving(folder: Path, model: str | Path, **settings: Any) -> Iterator[Served]:
    """`trimtab serve generator` on vLLM with these settings, until the block ends; its exit code is 0 then."""
    folder.mkdir(parents=True, exist_ok=True)
    config, ready, log = folder / "generator.yaml", folder / "ready.json", folder / "log"
    config.write_text(yaml.safe_dump(settings_of(model, ready_file=str(ready), **settings)))
    with log.open("wb") as lines:
        process = subprocess.Popen(
            [sys.executable, "-m", "trimtab", "serve", "generator", "--config", str(config)],
            stdout=lines,
            stderr=lines,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    try:
        until_s = time.monotonic() + START_S
        while not ready.exists():
            assert process.poll() is None and time.monotonic() < until_s, log.read_text()[-6000:]
            time.sleep(0.05)
        yield Served(f"127.0.0.1:{json.loads(ready.read_text())['port']}", process, log)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, log.read_text()[-6000:]
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def full_logprobs(folder: Path, prompt: list[int], tokens: list[int], temperature: float = 1.0) -> np.ndarray:
    """Log-probs of the tokens by a full forward of the model in `folder`; float32 [tokens]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([prompt + tokens])
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()


def local_samples(folder: Path, requests: list[tuple[list[int], int, Sampling]]) -> list[Any]:
    """What the local engine samples for (prompt, seed, sampling), in order."""
    policy = load_policy(GeneratorConfig(model=str(folder), port=0, metrics_port=None), None).policy
    engine = LocalEngine(
        policy.model,
        policy.tokenizer,
        eos_token_ids=policy.eos_token_ids,
        version=ModelVersion("", "local", 0),
        max_length=MAX_LENGTH,
    )
    engine.submit(
        [
            SequenceRequest(index, np.array(prompt, np.int32), index, seed, sampling)
            for index, (prompt, seed, sampling) in enumerate(requests)
        ]
    )
    ended = {}
    while engine.has_work:
        ended.update({outcome.sequence_id: outcome for outcome in engine.step()})
    return [ended[index] for index in range(len(requests))]
