"""How long a generator under full load waits for a new version: whole or as a delta, in either engine.

All slots are taken, and refilled as they free up, while versions of a 135M-parameter policy (SmolLM2-135M's shape,
random weights) come from a store one after the other: fetched, verified and staged on another thread, as the server
does it, then swapped to. Printed for each: how long sampling waited for the swap; with the local engine also the
longest and the ordinary time between two tokens of a sequence from the fetch on. Every token must bear a version, no
sequence may fail.

    python -m benchmarks.swap --out swap.json
    build/vllm/bin/python -m benchmarks.swap --engine vllm
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import count, pairwise
from pathlib import Path
from statistics import median

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.machine import BusyMeter, describe_machine
from benchmarks.publish import random_model
from trimtab.generator.config import GeneratorConfig, VllmOptions
from trimtab.generator.engine import Engine, FinishedSequence, Sampling, SequenceRequest, SwapMode
from trimtab.generator.loading import let_go, load_policy, stage_weights
from trimtab.generator.local.scheduler import LocalEngine
from trimtab.models.policy import Policy
from trimtab.weights.delta_publish import Deltas
from trimtab.weights.store import Store, open_store
from trimtab_client import ModelVersion

PROMPT_TOKENS, NEW_TOKENS = 32, 96


@dataclass(frozen=True)
class Swap:
    """One version's arrival: how long sampling waited for it (`pause_ms`), and times between two tokens."""

    engine: str
    dtype: str
    kind: str
    mode: str
    stage_s: float
    pause_ms: float
    longest_interval_ms: float | None
    ordinary_interval_ms: float | None


class Load:
    """Keeps every slot of an engine taken and looks at what comes out."""

    def __init__(self, engine: Engine, slots: int, vocab_size: int) -> None:
        self.engine = engine
        self._slots = slots
        self._ids = count()
        self._random = np.random.default_rng(0)
        self._vocab_size = vocab_size
        self.finished = 0
        self.mixed = 0

    def step(self) -> float:
        """Step once, with sequences waiting; when it ended."""
        missing = 2 * self._slots - self.engine.live - self.engine.waiting
        self.engine.submit([self._request() for _ in range(missing)])
        for outcome in self.engine.step():
            assert isinstance(outcome, FinishedSequence), outcome
            assert sum(run.token_count for run in outcome.runs) == len(outcome.token_ids) == len(outcome.logprobs)
            self.finished += 1
            self.mixed += len(outcome.runs) > 1
        return time.perf_counter()

    def _request(self) -> SequenceRequest:
        index = next(self._ids)
        prompt = self._random.integers(0, self._vocab_size, PROMPT_TOKENS, dtype=np.int32)
        new_tokens = int(self._random.integers(NEW_TOKENS // 2, NEW_TOKENS + 1))
        return SequenceRequest(index, prompt, index, index, Sampling(new_tokens, ignore_eos=True))


def swap(load: Load, policy: Policy, store: Store, version: ModelVersion, mode: SwapMode) -> dict[str, float | None]:
    """Bring `version` into the engine as the server does; the times of a `Swap`."""
    engine, local = load.engine, isinstance(load.engine, LocalEngine)
    ordinary = _intervals([load.step() for _ in range(32)]) if local else []
    served = engine.version if engine.takes_patches else None
    with ThreadPoolExecutor(1) as beside:
        started_s = time.perf_counter()
        staging = beside.submit(stage_weights, store, version, policy, served)
        stamps = [load.step()]
        while not staging.done():
            stamps.append(load.step())
        stage_s = time.perf_counter() - started_s
        staged = staging.result()
        swapping: Future[ModelVersion] = engine.swap(staged, mode)
        while not swapping.done():
            stamps.append(load.step())
        freeing = beside.submit(let_go, staged)
        while not freeing.done():
            stamps.append(load.step())
    assert swapping.result().step == version.step == engine.version.step
    return {
        "stage_s": stage_s,
        "pause_ms": engine.pause_s * 1e3,
        "longest_interval_ms": max(_intervals(stamps)) * 1e3 if local else None,
        "ordinary_interval_ms": median(ordinary) * 1e3 if local else None,
    }


def _intervals(stamps_s: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(stamps_s)] or [0.0]


def changed(source: Path, folder: Path, share: float) -> Path:
    """The model of `source` with that share of its elements moved by an eighth."""
    tensors = load_file(source / "model.safetensors")
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    torch.manual_seed(1)
    for tensor in tensors.values():
        tensor.mul_(1 + 0.125 * (torch.rand(tensor.shape) < share))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def measure(options: argparse.Namespace, root: Path) -> list[Swap]:
    """Every kind of version into one engine, `--repeats` times."""
    first = random_model(root / "model", options.layers)
    folders = {"full": changed(first, root / "full", 1.0), "delta": changed(first, root / "delta", options.share)}
    config = GeneratorConfig(
        model=str(first), dtype=options.dtype, engine=options.engine, max_slots=options.slots, port=0,
        vllm=VllmOptions(eager=True, kv_cache_gib=1), threads=options.threads,
    )  # fmt: skip
    loaded = load_policy(config, None)
    engine = make_engine(config, loaded.policy, loaded, options.slots)
    store, found, step = open_store(str(root / "store")), [], count(1)
    store.publish(first, run_id="bench", name="policy", step=next(step))
    load = Load(engine, options.slots, loaded.policy.vocab_size)
    for _ in range(64):
        load.step()
    deltas = Deltas(max_share=1.0, cache_dir=root / "publisher")
    for mode in (SwapMode.KEEP, SwapMode.RECOMPUTE_KV):
        for _ in range(options.repeats):
            base = store.publish(first, run_id="bench", name="policy", step=next(step), deltas=deltas).version
            swap(load, loaded.policy, store, base, SwapMode.KEEP)
            for kind in ("delta", "full") if engine.takes_patches else ("full",):
                published = store.publish(
                    folders[kind], run_id="bench", name="policy", step=next(step),
                    deltas=deltas if kind == "delta" else None,
                )  # fmt: skip
                assert published.kind == kind
                times = swap(load, loaded.policy, store, published.version, mode)
                found.append(Swap(options.engine, options.dtype, kind, mode.value, **times))  # type: ignore[arg-type]
                print(found[-1], flush=True)
    print(f"{load.finished} sequences ended, {load.mixed} of them by two versions, none failed")
    if not isinstance(engine, LocalEngine):
        engine.close()  # type: ignore[attr-defined]
    return found


def make_engine(config: GeneratorConfig, policy: Policy, loaded: object, slots: int) -> Engine:
    """As the server makes it."""
    max_length = PROMPT_TOKENS + NEW_TOKENS
    if config.engine == "vllm":
        from trimtab.generator.vllm.start import start_engine

        return start_engine(config, loaded, max_length, lambda reason: print(reason))  # type: ignore[arg-type]
    version = ModelVersion("", "policy", 0)
    return LocalEngine(
        policy.model, policy.tokenizer, eos_token_ids=policy.eos_token_ids, version=version, max_length=max_length,
        max_slots=slots,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("local", "vllm"), default="local")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--share", type=float, default=0.04, help="of the elements that a delta changes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    meter = BusyMeter()
    with tempfile.TemporaryDirectory(prefix="trimtab-bench-swap-") as scratch:
        found = measure(options, Path(scratch))
    if options.out:
        result = {
            "machine": asdict(describe_machine()),
            "options": {name: value for name, value in vars(options).items() if name != "out"},
            "busy_cores": round(meter.cores(), 2),
            "swaps": [asdict(one) for one in found],
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
