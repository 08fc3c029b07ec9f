"""Before serving: does cached, ragged decoding give the log-probs of full forwards? Refuse to serve if it does not."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from trimtab.generator.local import attention
from trimtab.generator.local.blocks import BLOCK, sample_whole_blocks
from trimtab.generator.local.llama import LlamaRunner
from trimtab.generator.local.runner import ModelRunner
from trimtab.generator.local.sampler import SampleRows
from trimtab.runtime.logs import get_logger

log = get_logger(__name__)

PROMPT_LENGTHS = (9, 3, 14)
COMPANY_LENGTHS = (9, 3, 70)
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


def check(model: PreTrainedModel) -> None:
    """Decode by transformers' forward over a cache; ValueError where that differs from full forwards."""
    compare(model, ModelRunner(model, max_rows=len(PROMPT_LENGTHS)))


@torch.inference_mode()
def compare(model: PreTrainedModel, runner: ModelRunner | LlamaRunner) -> None:
    """Decode three prompts of different lengths side by side; ValueError where log-probs differ from full forwards."""
    sequences = _sequences(model, PROMPT_LENGTHS)
    cached_BTV = torch.log_softmax(_decoded(runner, sequences, PROMPT_LENGTHS), dim=-1)
    for row, sequence in enumerate(sequences):
        ids = torch.from_numpy(sequence.astype(np.int64)).to(model.device)[None]
        full = model(input_ids=ids, use_cache=False).logits[0, PROMPT_LENGTHS[row] - 1 :].float()
        difference = (torch.log_softmax(full, dim=-1) - cached_BTV[row]).abs()
        exact = model.dtype in (torch.float32, torch.float64)
        error, limit = (difference.max(), FLOAT32_TOLERANCE) if exact else (difference.mean(), HALF_TOLERANCE)
        if not error <= limit:
            raise ValueError(f"log-probs of cached decoding and of a full forward differ by {float(error):.3g}")


@torch.inference_mode()
def check_company(runner: LlamaRunner) -> None:
    """Decode sequences alone and in the places of a block and more; ValueError where one bit differs."""
    longest = runner.model.config.max_position_embeddings - DECODE_STEPS
    lengths = [min(length, longest) for length in COMPANY_LENGTHS]
    sequences = _sequences(runner.model, lengths)
    alone = [_decoded(runner, [one], [length]) for one, length in zip(sequences, lengths, strict=True)]
    rows = min(runner.max_rows, BLOCK + 1)
    turns = [turn % len(sequences) for turn in range(rows)]
    company = _decoded(runner, [sequences[turn] for turn in turns], [lengths[turn] for turn in turns])
    expected = torch.cat([alone[turn] for turn in turns])
    if not torch.equal(company, expected):
        raise ValueError("on this machine a sequence's bits depend on the batch")
    for step in range(DECODE_STEPS + 1):
        sampled, apart = _sampled(company[:, step]), [_sampled(company[row : row + 1, step]) for row in range(rows)]
        if not np.array_equal(sampled, np.concatenate(apart, axis=1)):
            raise ValueError("on this machine a sample's bits depend on the batch")


def _sequences(model: PreTrainedModel, prompt_lengths: Sequence[int]) -> list[np.ndarray]:
    """Random sequences, int32, of a prompt and the tokens to decode after it."""
    embeddings = model.get_input_embeddings()
    vocab_size = int(embeddings.weight.shape[0])  # type: ignore[union-attr,arg-type]
    draws = np.random.default_rng(0)
    return [draws.integers(0, vocab_size, length + DECODE_STEPS, dtype=np.int32) for length in prompt_lengths]


def _decoded(
    runner: ModelRunner | LlamaRunner, sequences: Sequence[np.ndarray], prompt_lengths: Sequence[int]
) -> torch.Tensor:
    """Logits [B, 1 + DECODE_STEPS, V] after each prompt and each further token, the sequences side by side."""
    runner.reset()
    lengths_B = np.array(prompt_lengths)
    prompts = [sequence[:length] for sequence, length in zip(sequences, prompt_lengths, strict=True)]
    logits = [runner.prefill(prompts, first_row=0)]
    for step in range(DECODE_STEPS):
        tokens_B = np.array([one[length + step] for one, length in zip(sequences, prompt_lengths, strict=True)])
        logits.append(runner.decode(tokens_B, lengths_B + step))
    return torch.stack(logits, dim=1)


def _sampled(logits_BV: torch.Tensor) -> np.ndarray:
    """Token ids and the bits of their log-probs, int32 [2, B], of rows with one draw."""
    count = len(logits_BV)
    rows = SampleRows(
        draws=np.full(count, 0.7),
        temperatures=np.full(count, 0.7, np.float32),
        top_ps=np.ones(count, np.float32),
        top_ks=np.zeros(count, np.int64),
    )
    sampled = sample_whole_blocks(logits_BV, rows)
    return np.stack((sampled.token_ids.astype(np.int32), sampled.logprobs.view(np.int32)))
