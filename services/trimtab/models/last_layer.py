"""The last layer, computed for the tokens whose hidden states are read.

Every other layer's output is seen by later tokens; the last one's is read at response tokens only, or at a sequence's
end. Behind its attention nothing else need be computed: two thirds of the layer, for a third to all of the tokens.
Suffixes: N tokens of the packed row, R those that are read.
"""

from __future__ import annotations

import inspect
from types import CodeType, MethodType
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


def shorten(model: PreTrainedModel) -> None:
    """Let the last layer of a model of Llama's layers heed `wanted_R`; other families' layers stay as they are."""
    layer = _last_layer(model)
    if layer is not None and instructions(type(layer)) == instructions(LlamaDecoderLayer):
        layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]


def is_short(model: PreTrainedModel) -> bool:
    """Whether the model takes `wanted_R`."""
    return getattr(getattr(_last_layer(model), "forward", None), "__func__", None) is _forward


def _forward(
    layer: Any, hidden_states: torch.Tensor, *, wanted_R: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor:
    """LlamaDecoderLayer.forward, [1, N, D] → [1, R, D], or for all N tokens where none are named."""
    if wanted_R is None:
        return type(layer).forward(layer, hidden_states, **kwargs)
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
    residual = hidden_states.index_select(1, wanted_R) + attended.index_select(1, wanted_R)
    return residual + layer.mlp(layer.post_attention_layernorm(residual))


def _last_layer(model: PreTrainedModel) -> torch.nn.Module | None:
    layers = getattr(model.base_model, "layers", None)
    return layers[-1] if isinstance(layers, torch.nn.ModuleList) and len(layers) else None


def instructions(kind: type[torch.nn.Module]) -> tuple[bytes, tuple[str, ...], tuple[str, ...]] | None:
    """What a module's forward does: its byte code and the names that it reads. None where it is not Python's."""
    code: CodeType | None = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return None if code is None else (code.co_code, code.co_names, code.co_varnames)
