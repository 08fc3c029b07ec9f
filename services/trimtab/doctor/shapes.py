"""The shape of a model, by which its memory is reckoned: read from its config alone, its weights are never loaded.

The parameters are counted on a model that is built on torch's meta device: exact for every architecture that
transformers knows.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.models.folders import max_length_of
from trimtab.models.gated import keeps_half
from trimtab.models.tokenizers import first_line
from trimtab.weights.errors import StoreError
from trimtab.weights.sources import PlainSource, parse_source, resolve_reference
from trimtab.weights.store import Store

MLP_KEPT = 4
"""Of an MLP with a gate: gate, up, activated gate and their product. `models.gated` keeps the first two."""


class UnknownShapeError(Exception):
    """The model's config cannot be had from here; the message says why."""


@dataclass(frozen=True)
class ModelShape:
    """What memory depends on.

    Attributes:
        parameters: all of them, an LM head that is tied to the embeddings counted once.
        head_parameters: those of the LM head alone (vocabulary · hidden), which a scalar model lacks where it is not
            tied.
        block_parameters: those of one transformer block.
        intermediate: width of the MLP, times the experts that a token goes to.
        gated: whether the MLP has a gate beside its up projection.
        mlp_kept: what a trained MLP keeps of one token for its backward pass, in multiples of `intermediate`.
        query_key_norms: whether queries and keys are normalised per head.
        model_type: transformers' name of the architecture.
    """

    parameters: int
    head_parameters: int
    block_parameters: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    gated: bool
    mlp_kept: int
    query_key_norms: bool
    max_length: int
    model_type: str = ""

    @property
    def scalar_parameters(self) -> int:
        """Parameters of the same body with one number a token in place of an LM head."""
        return self.parameters - (0 if self.tied else self.head_parameters) + self.hidden

    @property
    def attention_width(self) -> int:
        """Width of all heads together."""
        return self.heads * self.head_dim


def shape_of(source: str, store: Store | None, like: str | None = None) -> ModelShape:
    """The shape of a model source (a folder, a hub id, "version:RUN/NAME[@STEP]").

    `like` is the source whose shape a version has that is not published yet. Raises UnknownShapeError.
    """
    try:
        parsed = parse_source(source)
        if isinstance(parsed, PlainSource):
            return _shape(_config(parsed.path_or_id))
        if store is None:
            raise UnknownShapeError(f"{source} needs a store")
        manifest = resolve_reference(parsed, store)
        with tempfile.TemporaryDirectory(prefix="trimtab-doctor-") as folder:
            (Path(folder) / "config.json").write_bytes(store.read_file(manifest, "config.json"))
            return _shape(_config(folder))
    except (StoreError, UnknownShapeError) as error:
        if like is None:
            raise UnknownShapeError(str(error)) from error
        return shape_of(like, store)


def _config(path_or_id: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path_or_id)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise UnknownShapeError(f"{path_or_id} has no readable config ({first_line(error)})") from error


def _shape(config: Any) -> ModelShape:
    text = config.get_text_config()
    model = _on_meta(config)
    body: Any = model.base_model
    blocks = getattr(body, "layers", None) or getattr(body, "h", None)
    if not blocks:
        raise UnknownShapeError(f"{config.model_type}: no list of blocks was found in the model")
    block: Any = blocks[-1]
    names = {name.rpartition(".")[2] for name, _ in block.named_modules()}
    heads = int(text.num_attention_heads)
    intermediate = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None)
    intermediate = int(intermediate or getattr(text, "n_inner", None) or 4 * text.hidden_size)
    head = model.get_output_embeddings().weight
    gated = bool(names & {"gate_proj", "gate_up_proj"})
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        head_parameters=head.numel(),
        block_parameters=sum(p.numel() for p in block.parameters()),
        layers=len(blocks),
        hidden=int(text.hidden_size),
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        intermediate=intermediate * int(getattr(text, "num_experts_per_tok", None) or 1),
        vocabulary=head.shape[0],
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        gated=gated,
        mlp_kept=MLP_KEPT if gated and not keeps_half(block) else 2,
        query_key_norms=bool(names & {"q_norm", "q_layernorm"}),
        max_length=max_length_of(config),
        model_type=config.model_type,
    )


def _on_meta(config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    config.architectures = None
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, ImportError, AttributeError) as error:
        raise UnknownShapeError(f"{config.model_type}: {first_line(error)}") from error
    model.tie_weights()
    return model
