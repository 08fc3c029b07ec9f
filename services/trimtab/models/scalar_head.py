"""A model with one number a token: reward models (read at the last token) and value models (read at every token).

On disk it is a one-label Hugging Face sequence-classification folder; the score's mean and deviation on
reference samples stand in its config as `trimtab_score_mean` and `trimtab_score_std`.
"""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from trimtab.models import attention, gated, last_layer, layouts, norms, rotary
from trimtab.models.errors import ModelLoadError
from trimtab.models.folders import check_vocabulary, load_pretrained, max_length_of, save_pretrained
from trimtab.models.packing import PackedBatch
from trimtab.models.policy import Policy, body_forward
from trimtab.models.sharded import compute_dtype, whole_weights
from trimtab.models.tokenizers import eos_token_ids, load_tokenizer, tokenizer_digest


class ScalarModel:
    """A body with a scalar head and the constants that normalise its score.

    Attributes:
        mean, std: normalised = (score − mean) / std.
        is_normalized: whether its folder names them, as those that the reward stage writes do.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
        norms.shorten(model)
        rotary.shorten(model)
        gated.shorten(model)
        last_layer.shorten(model)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.source = source
        self.tokenizer_digest = tokenizer_digest(tokenizer)
        self.eos_token_ids = eos_token_ids(model.config, None, tokenizer)
        self.max_length = max_length_of(model.config)
        self.vocab_size = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[arg-type]
        self.mean = float(getattr(model.config, "trimtab_score_mean", 0.0))
        self.std = float(getattr(model.config, "trimtab_score_std", 1.0))
        self.is_normalized = getattr(model.config, "trimtab_score_mean", None) is not None
        check_vocabulary(tokenizer, self.vocab_size, source)

    @classmethod
    def load(cls, source: str, *, dtype: str = "float32", device: str | torch.device = "cpu") -> ScalarModel:
        """Load a one-label sequence-classification folder or hub id.

        Raises:
            ModelLoadError: not loadable, more than one label, or no causal body with a `score` head.
        """
        model = load_pretrained(AutoModelForSequenceClassification, source, dtype=dtype, attention=attention.NAME)
        if model.config.num_labels != 1:
            raise ModelLoadError("config", f"{source} has {model.config.num_labels} labels; a reward model has one")
        if not isinstance(getattr(model, "score", None), torch.nn.Linear):
            raise ModelLoadError(
                "config", f"{source}: {type(model).__name__} has no causal body with a linear `score` head"
            )
        torch.nn.Module.to(model, device)
        layouts.check_packing(model, body_forward, source)
        return cls(model, load_tokenizer(source), source)

    @classmethod
    def from_policy(cls, policy: Policy, *, seed: int) -> ScalarModel:
        """The policy's body with a fresh head: weight ~ N(0, 1/√(D+1)), bias 0.

        The deviation is Ziegler 2019's (arXiv:1909.08593, code), with the square root.
        """
        config = copy.deepcopy(policy.model.config)
        config.num_labels = 1
        model: Any = AutoModelForSequenceClassification.from_config(
            config, dtype=policy.model.dtype, attn_implementation=attention.NAME
        )
        model.base_model.load_state_dict(policy.model.base_model.state_dict())
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(model.score.weight.shape, generator=generator)
        with torch.no_grad():
            model.score.weight.copy_(weight * (model.score.in_features + 1) ** -0.5)
            if model.score.bias is not None:
                model.score.bias.zero_()
        return cls(model.to(policy.device), policy.tokenizer, policy.source)

    def scores(self, packed: PackedBatch, wanted_R: torch.Tensor | None = None) -> torch.Tensor:
        """Raw score at every token, float32 [N], or [R] at the positions `wanted_R` of the row."""
        return whole_weights(self.model, lambda: self.head_scores(body_forward(self.model, packed, wanted_R)))

    def head_scores(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Raw scores of last hidden states, float32 [N]."""
        head: Any = self.model.score
        bias = None if head.bias is None else head.bias.float()
        with torch.autocast(hidden_ND.device.type, enabled=False):
            if hidden_ND.dtype == torch.float64:
                return head(hidden_ND)[:, 0]
            return torch.nn.functional.linear(hidden_ND.float(), head.weight.float(), bias)[:, 0]

    def last_token_scores(self, packed: PackedBatch) -> torch.Tensor:
        """Raw score of each sequence, read at its last token, float32 [B]."""
        return self.scores(packed, packed.last_tokens_B)

    def normalized(self, scores: torch.Tensor) -> torch.Tensor:
        """(score − mean) / std."""
        return (scores - self.mean) / self.std

    def set_normalization(self, mean: float, std: float) -> None:
        """Keep the constants, here and in the config that is saved."""
        self.mean, self.std, self.is_normalized = mean, std, True
        self.model.config.trimtab_score_mean = mean
        self.model.config.trimtab_score_std = std

    def fold_normalization(self) -> None:
        """Scale the head so that `normalized` keeps its values with std = 1 (how a value model starts)."""
        head: Any = self.model.score
        with torch.no_grad():
            head.weight.div_(self.std)
            if head.bias is not None:
                head.bias.div_(self.std)
        self.set_normalization(self.mean / self.std, 1.0)

    def save(self, folder: Path) -> None:
        """Write a plain Hugging Face folder."""
        save_pretrained(self.model, self.tokenizer, folder)

    @cached_property
    def shares_beginnings(self) -> bool:
        """Whether `packing.pack_sets` gives this model's own scores."""
        return layouts.shares_beginnings(self.model, body_forward)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> str:
        return compute_dtype(self.model)

    @property
    def architecture(self) -> str:
        return type(self.model).__name__.removeprefix("FSDP")

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())
