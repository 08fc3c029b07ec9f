"""One case of the generation benchmark in one process: transformers.generate and trimtab's engine, round by round.

transformers takes the requests in groups of as many as there are slots, left-padded, each to its longest response;
its log-probs are read from the logits it returns. trimtab's engine is driven without a server. The last round's samples
of every side are compared with one full forward a sequence.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.generation_work import Requests, read_requests
from trimtab.generator.config import GeneratorConfig
from trimtab.generator.engine import FinishedSequence, Sampling, SequenceRequest
from trimtab.generator.loading import load_policy
from trimtab.generator.local.scheduler import LocalEngine
from trimtab_client.versions import ModelVersion

TRANSFORMERS, TRIMTAB, DETERMINISTIC = "transformers", "trimtab", "trimtab, deterministic"

Samples = list[tuple[np.ndarray, np.ndarray]]
"""Token ids and log-probs of each request, in order."""


def transformers_side(folder: Path, dtype: str, requests: Requests) -> Callable[[int], Samples]:
    """`generate` as a user would call it for sampled tokens with their log-probs."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.generation_config.eos_token_id = None  # every request has its length

    @torch.inference_mode()
    def run(_: int) -> Samples:
        samples: Samples = []
        for first in range(0, len(requests.prompts), requests.slots):
            prompts = requests.prompts[first : first + requests.slots]
            counts = requests.new_tokens[first : first + requests.slots]
            width = max(map(len, prompts))
            ids_BL = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
            mask_BL = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            found = model.generate(
                input_ids=ids_BL, attention_mask=mask_BL, max_new_tokens=max(counts), do_sample=True, temperature=1.0,
                top_k=0, top_p=1.0, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
            tokens_BT = found.sequences[:, width:]
            logprobs_BTV = torch.log_softmax(torch.stack(found.logits, dim=1).float(), dim=-1)
            logprobs_BT = logprobs_BTV.gather(2, tokens_BT[..., None])[..., 0]
            rows = zip(tokens_BT.numpy(), logprobs_BT.numpy(), counts, strict=True)
            samples += [(tokens[:count], logprobs[:count]) for tokens, logprobs, count in rows]
        return samples

    return run


def trimtab_side(folder: Path, dtype: str, requests: Requests, *, deterministic: bool) -> Callable[[int], Samples]:
    """The local engine, all requests at once in its queue."""
    loaded = load_policy(GeneratorConfig(model=str(folder), dtype=dtype, port=0), None)  # type: ignore[arg-type]
    engine = LocalEngine(
        loaded.policy.model,
        loaded.policy.tokenizer,
        eos_token_ids=(),
        version=ModelVersion(run_id="", name="benchmark", step=0, digest=""),
        max_length=256,
        max_slots=requests.slots,
        deterministic=deterministic,
    )

    def run(number: int) -> Samples:
        first = number * len(requests.prompts)
        asked = zip(requests.prompts, requests.new_tokens, strict=True)
        sequences = [
            SequenceRequest(
                sequence_id=first + index,
                prompt_ids=np.array(prompt, dtype=np.int32),
                prompt_key=first + index,
                seed=first + index,
                sampling=Sampling(max_tokens=count, ignore_eos=True),
            )
            for index, (prompt, count) in enumerate(asked)
        ]
        engine.submit(sequences)
        finished: dict[int, FinishedSequence] = {}
        while engine.has_work:
            for outcome in engine.step():
                assert isinstance(outcome, FinishedSequence), outcome
                finished[outcome.sequence_id] = outcome
        inside = [finished[sequence.sequence_id] for sequence in sequences]
        return [(one.token_ids, one.logprobs) for one in inside]

    return run


@torch.inference_mode()
def logprob_error(model: PreTrainedModel, requests: Requests, samples: Samples) -> float:
    """Largest difference between the samples' log-probs and those of one full forward a sequence, nats."""
    largest = 0.0
    for prompt, count, (tokens, logprobs) in zip(requests.prompts, requests.new_tokens, samples, strict=True):
        if len(tokens) != count or len(logprobs) != count:
            raise RuntimeError(f"{len(tokens)} tokens and {len(logprobs)} log-probs where {count} were asked for")
        ids = torch.tensor([[*prompt, *map(int, tokens)]])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        expected = torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()
        largest = max(largest, float(np.abs(expected - np.asarray(logprobs)).max()))
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-dir", type=Path, required=True)
    parser.add_argument("--requests", type=Path, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--vllm", type=Path, help="what vllm_generate.py wrote: its log-probs are checked too")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    requests = read_requests(args.requests)
    sides = {
        TRANSFORMERS: transformers_side(args.model_dir, args.dtype, requests),
        TRIMTAB: trimtab_side(args.model_dir, args.dtype, requests, deterministic=False),
        DETERMINISTIC: trimtab_side(args.model_dir, args.dtype, requests, deterministic=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    samples: dict[str, Samples] = {}
    for number in range(args.rounds + 1):
        for name, run in sides.items():
            started_s = time.perf_counter()
            samples[name] = run(number)
            seconds[name].append(time.perf_counter() - started_s)
    # The first round warms up.
    found = {name: {"seconds": seconds[name][1:]} for name in sides}
    if args.vllm is not None:
        theirs = json.loads(args.vllm.read_text())
        found["vllm"] = {"seconds": theirs["seconds"]}
        samples["vllm"] = [(np.array(one["tokens"]), np.array(one["logprobs"])) for one in theirs["samples"]]
    model = AutoModelForCausalLM.from_pretrained(args.model_dir, dtype=args.dtype).eval()
    errors = {name: {"logprob_error": logprob_error(model, requests, got)} for name, got in samples.items()}
    args.out.write_text(json.dumps({name: found[name] | errors[name] for name in found}))


if __name__ == "__main__":
    main()
