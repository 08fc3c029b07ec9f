"""Plain Hugging Face folders: loading with errors a person can act on, saving so that `from_pretrained` works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from trimtab.models import lora
from trimtab.models.errors import ModelLoadError, OtherModelError
from trimtab.models.tokenizers import first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
UNKNOWN_MAX_LENGTH = 1 << 20


def load_pretrained(
    auto_class: Any, source: str, *, dtype: str, attention: str | None, missing_ok: tuple[str, ...] = (), **kwargs: Any
) -> PreTrainedModel:
    """`auto_class.from_pretrained` of a folder or hub id, safetensors only.

    Args:
        missing_ok: parameter name suffixes that may be absent from the weights.

    Raises:
        ModelLoadError: no such folder or id, unreadable or incomplete weights, unknown dtype.
    """
    if dtype not in DTYPES:
        raise ModelLoadError("dtype", f"{dtype!r} is not one of {', '.join(DTYPES)}")
    looks_local = source.startswith((".", "/", "~")) or Path(source).exists()
    if looks_local and not (Path(source) / "config.json").is_file():
        raise ModelLoadError("model", f"{source} is not a model folder (it has no config.json)")
    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    options = {} if attention is None else {"attn_implementation": attention}
    try:
        model, report = auto_class.from_pretrained(
            source, dtype=DTYPES[dtype], use_safetensors=True, output_loading_info=True, **options, **kwargs
        )
    except Exception as error:
        field = "weights" if looks_local else "model"
        raise ModelLoadError(field, f"{source} cannot be loaded ({first_line(error)})") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing = [name for name in report["missing_keys"] if not name.endswith(missing_ok)]
    if missing or report.get("mismatched_keys"):
        names = ", ".join(map(str, [*missing, *report.get("mismatched_keys", [])][:3]))
        raise OtherModelError("weights", f"{source}: missing or misshapen parameters, for example {names}")
    return model


def save_pretrained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model (in its own dtype) and tokenizer; adapters are merged."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, state_dict=lora.plain_state(model) if lora.is_adapted(model) else None)
    tokenizer.save_pretrained(folder)


def max_length_of(config: PretrainedConfig) -> int:
    """Longest sequence the positions of a model allow, in tokens."""
    text: Any = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if getattr(text, name, None):
            return int(getattr(text, name))
    return UNKNOWN_MAX_LENGTH


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, source: str) -> None:
    """ModelLoadError when the tokenizer makes ids the model has no embedding for."""
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= vocab_size:
        raise ModelLoadError(
            "tokenizer", f"{source}: the tokenizer makes ids up to {highest}, the model knows {vocab_size} tokens"
        )
