"""Before serving: does cached, ragged decoding give the log-probs of full forwards? Refuse to serve if it does not."""

import numpy as np
import torch
from transformers import PreTrainedModel

from trimtab.generator.local import attention
from trimtab.generator.local.runner import ModelRunner
from trimtab.runtime.logs import get_logger

log = get_logger(__name__)

PROMPT_LENGTHS = (9, 3, 14)
DECODE_STEPS = 4
# Largest difference in float32; mean difference in half precision, where rounding alone moved it by 0.1 in a model
# of 30 layers (SmolLM2-135M in bfloat16). A past that is read wrongly moves it by 1 and more.
FLOAT32_TOLERANCE = 2e-3
HALF_TOLERANCE = 0.2


def prepare(model: PreTrainedModel) -> None:
    """Give `model` the fastest attention that is right for it: ours, transformers' default, or eager.

    Raises ValueError where cached decoding does not agree with full forwards with any of them.
    """
    default = model.config._attn_implementation or "eager"
    ours = [attention.NAME] if default == "sdpa" and model.device.type == "cpu" else []
    refusals: list[Exception] = []
    for name in dict.fromkeys([*ours, default, "eager"]):
        try:
            model.set_attn_implementation(name)
            check(model)
        except Exception as error:  # transformers' models fail in their own ways; the reason is told below
            log.warning("attention is not right for this model", attention=name, reason=str(error))
            refusals.append(error)
        else:
            return
    raise ValueError(
        f"{type(model).__name__} cannot be served by the local engine: {refusals[-1]} "
        "(check that the model folder is whole; another engine may serve it)"
    ) from refusals[-1]


@torch.inference_mode()
def check(model: PreTrainedModel) -> None:
    """Decode three prompts of different lengths side by side and compare; ValueError where they differ."""
    embeddings = model.get_input_embeddings()
    vocab_size = int(embeddings.weight.shape[0])  # type: ignore[union-attr,arg-type]
    draws = np.random.default_rng(0)
    sequences = [draws.integers(0, vocab_size, length + DECODE_STEPS, dtype=np.int32) for length in PROMPT_LENGTHS]
    runner = ModelRunner(model, max_rows=len(sequences))
    lengths_B = np.array(PROMPT_LENGTHS)
    prompts = [sequence[:length] for sequence, length in zip(sequences, PROMPT_LENGTHS, strict=True)]
    logits = [runner.prefill(prompts, first_row=0)]
    for step in range(DECODE_STEPS):
        tokens_B = np.array([seq[length + step] for seq, length in zip(sequences, PROMPT_LENGTHS, strict=True)])
        logits.append(runner.decode(tokens_B, lengths_B + step))
    cached_BTV = torch.log_softmax(torch.stack(logits, dim=1), dim=-1)
    for row, sequence in enumerate(sequences):
        ids = torch.from_numpy(sequence.astype(np.int64)).to(model.device)[None]
        full = model(input_ids=ids, use_cache=False).logits[0, PROMPT_LENGTHS[row] - 1 :].float()
        difference = (torch.log_softmax(full, dim=-1) - cached_BTV[row]).abs()
        exact = model.dtype in (torch.float32, torch.float64)
        error, limit = (difference.max(), FLOAT32_TOLERANCE) if exact else (difference.mean(), HALF_TOLERANCE)
        if not error <= limit:
            raise ValueError(f"log-probs of cached decoding and of a full forward differ by {float(error):.3g}")
