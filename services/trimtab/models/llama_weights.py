"""The weights of a Llama-family model as llama.py reads them: few matrices, each packed once (packed_linear.py)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from trimtab.models.packed_linear import PackedLinear

FAMILY = ("llama", "mistral", "qwen2", "qwen3")
TURNED = ("q_proj", "k_proj", "q_norm", "k_norm")
FIXED_ROTARY = ("default", "linear", "llama3", "yarn")


def is_llama(model: PreTrainedModel) -> bool:
    """Whether llama.py's formula is the body's, by its configuration, and helps: in memory of a CPU."""
    config = model.config
    rotary = getattr(config, "rope_parameters", None) or {}
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    return (
        config.model_type in FAMILY
        and model.device.type == "cpu"
        and model.dtype in (torch.float32, torch.bfloat16)
        and getattr(model, "hf_quantizer", None) is None
        and all(kind == "full_attention" for kind in kinds)
        and (config.model_type != "mistral" or config.sliding_window is None)
        and rotary.get("rope_type", "default") in FIXED_ROTARY
        and rotary.get("partial_rotary_factor", 1.0) == 1.0
    )


def lies_in_pairs(dtype: torch.dtype) -> bool:
    """Whether rows i and i + head_dim / 2 of queries and keys, which a rotary position turns together, are packed side
    by side: torch then turns them as complex numbers in one pass. Their products stay what they are. There is no
    complex bfloat16."""
    return dtype is torch.float32


@dataclass(frozen=True)
class Layer:
    """One layer's weights; norms are [D], those of queries and keys [head_dim] or None."""

    input_norm: torch.Tensor
    qkv: PackedLinear
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    output: PackedLinear
    mlp_norm: torch.Tensor
    gate_up: PackedLinear
    down: PackedLinear


@dataclass(frozen=True)
class LlamaWeights:
    """What a forward reads."""

    embedding_VD: torch.Tensor
    layers: tuple[Layer, ...]
    norm: torch.Tensor
    head: PackedLinear | None


class Packer:
    """Packs a model's tensors a piece at a time.

    Args:
        tensor: the tensor of a state dict's name, or None where the model has none.
        head_dim: size of a head of queries or keys.
        head: the head's name in the state dict; None leaves it out.
        block: rows of every product (packed_linear.py).
    """

    def __init__(
        self,
        tensor: Callable[[str], torch.Tensor | None],
        layers: int,
        head_dim: int,
        head: str | None = "lm_head",
        block: int | None = None,
    ) -> None:
        self._of = tensor
        self._block = block
        self._layers = layers
        self._head_dim = head_dim
        self._packed: list[Layer] = []
        self._head_name = head
        self._head: PackedLinear | None = None

    def pieces(self) -> Iterator[int]:
        """Pack a layer for each `next`, at last the head; yields how many elements that were."""
        for index in range(self._layers):
            self._packed.append(self._layer(f"model.layers.{index}."))
            last = self._packed[-1]
            yield sum(part.elements for part in (last.qkv, last.output, last.gate_up, last.down))
        if self._head_name is not None:
            self._head = self._linear("", self._head_name)
            yield self._head.elements

    def weights(self) -> LlamaWeights:
        """What `pieces` made, all of it."""
        assert len(self._packed) == self._layers and (self._head is None) == (self._head_name is None)
        embedding, norm = self._needed("model.embed_tokens.weight"), self._needed("model.norm.weight")
        return LlamaWeights(embedding, tuple(self._packed), norm, self._head)

    def _layer(self, prefix: str) -> Layer:
        return Layer(
            input_norm=self._needed(f"{prefix}input_layernorm.weight"),
            qkv=self._linear(f"{prefix}self_attn.", "q_proj", "k_proj", "v_proj"),
            query_norm=self._tensor(f"{prefix}self_attn.q_norm.weight"),
            key_norm=self._tensor(f"{prefix}self_attn.k_norm.weight"),
            output=self._linear(f"{prefix}self_attn.", "o_proj"),
            mlp_norm=self._needed(f"{prefix}post_attention_layernorm.weight"),
            gate_up=self._linear(f"{prefix}mlp.", "gate_proj", "up_proj"),
            down=self._linear(f"{prefix}mlp.", "down_proj"),
        )

    def _linear(self, prefix: str, *names: str) -> PackedLinear:
        weights = [self._needed(f"{prefix}{name}.weight") for name in names]
        return PackedLinear(weights, [self._tensor(f"{prefix}{name}.bias") for name in names], self._block)

    def _tensor(self, name: str) -> torch.Tensor | None:
        tensor = self._of(name)
        if tensor is None or name.split(".")[-2] not in TURNED or not lies_in_pairs(tensor.dtype):
            return tensor
        return tensor.unflatten(0, (-1, 2, self._head_dim // 2)).transpose(1, 2).flatten(0, 2)

    def _needed(self, name: str) -> torch.Tensor:
        tensor = self._tensor(name)
        assert tensor is not None, name
        return tensor
