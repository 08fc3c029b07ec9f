"""A policy: a Hugging Face causal LM with its tokenizer, run by the packed forward.

It gives hidden states and the LM head apart, so that `kernels` can turn them into log-probs without
ever forming all logits. It does not sample: that is the generator's room.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from trimtab.models import attention, gated, last_layer, layouts, norms, rotary
from trimtab.models.cpu import compiles_by_shape, rounded_rows
from trimtab.models.folders import check_vocabulary, load_pretrained, max_length_of, save_pretrained
from trimtab.models.packing import PackedBatch
from trimtab.models.sharded import compute_dtype
from trimtab.models.tokenizers import eos_token_ids, load_tokenizer, tokenizer_digest


@dataclass(frozen=True)
class LMHead:
    """The last layer: logits = scale · (hidden · weightᵀ + bias), then softcap · tanh(logits / softcap)."""

    weight_VD: torch.Tensor
    bias: torch.Tensor | None
    softcap: float | None
    scale: float


class Policy:
    """A causal LM and its tokenizer.

    Attributes:
        model: the transformers model, in eval mode, with packed attention.
        source: the folder or hub id it came from.
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
        self.eos_token_ids = eos_token_ids(model.config, model.generation_config, tokenizer)
        self.max_length = max_length_of(model.config)
        self.vocab_size = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[arg-type]
        check_vocabulary(tokenizer, self.vocab_size, source)

    @classmethod
    def load(cls, source: str, *, dtype: str = "float32", device: str | torch.device = "cpu") -> Policy:
        """Load a folder or hub id; ModelLoadError names what is wrong with it."""
        model = load_pretrained(AutoModelForCausalLM, source, dtype=dtype, attention=attention.NAME)
        torch.nn.Module.to(model, device)
        layouts.check_packing(model, body_forward, source)
        return cls(model, load_tokenizer(source), source)

    def hidden(self, packed: PackedBatch, wanted_R: torch.Tensor | None = None) -> torch.Tensor:
        """Last hidden states of a packed row: [N, D], or [R, D] at the positions `wanted_R`."""
        return body_forward(self.model, packed, wanted_R)

    @property
    def head(self) -> LMHead:
        """The LM head with the logit scalings that model families put behind it."""
        head: Any = self.model.get_output_embeddings()
        config: Any = self.model.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        return LMHead(
            weight_VD=head.weight,
            bias=getattr(head, "bias", None),
            softcap=getattr(config, "final_logit_softcapping", None),
            scale=float(scale),
        )

    def save(self, folder: Path) -> None:
        """Write a plain Hugging Face folder (safetensors, config, generation config, tokenizer)."""
        save_pretrained(self.model, self.tokenizer, folder)

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
    def generation_config(self) -> GenerationConfig | None:
        return self.model.generation_config  # type: ignore[return-value]

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def body_forward(model: PreTrainedModel, packed: PackedBatch, wanted_R: torch.Tensor | None = None) -> torch.Tensor:
    """Run a model's body (all but its head) on a packed row.

    Returns the last hidden states [N, D], or [R, D] at the positions `wanted_R` of the row.
    """
    short = wanted_R is not None and last_layer.is_short(model)
    count = len(packed.token_ids_N)
    behind = (0, _rows_for(model, count) - count)  # computed in vain: no token attends to them
    wanted = {}
    if wanted_R is not None and short:
        wanted["wanted_R"] = functional.pad(wanted_R, (0, _rows_for(model, len(wanted_R)) - len(wanted_R)))
    outputs = model.base_model(
        input_ids=functional.pad(packed.token_ids_N, behind)[None],
        position_ids=functional.pad(packed.position_ids_N, behind)[None],
        use_cache=False,
        packed=packed,
        **wanted,
    )
    hidden = outputs.last_hidden_state[0]
    if wanted_R is None:
        return hidden[:count]
    return hidden[: len(wanted_R)] if short else hidden.index_select(0, wanted_R)


def _rows_for(model: PreTrainedModel, count: int) -> int:
    return rounded_rows(count) if model.device.type == "cpu" and compiles_by_shape(model.dtype) else count
