"""The table of GPUs in docs/operations.md is what the doctor reckons, and each entry fits its GPUs."""

import re
from pathlib import Path

import pytest
from transformers import Qwen3Config

from trimtab.doctor import memory
from trimtab.doctor.shapes import ModelShape, shape_of

PAGE = Path(__file__).parents[3] / "docs" / "operations.md"
ENTRY = re.compile(r"(\d+): (\d+) . (\d+) GB")
GPUS = (1, 2, 4, 6, 8)
FULL = 0.95
SHAPES = {
    "Qwen3-0.6B": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "tie_word_embeddings": True,
    },
    "Qwen3-1.7B": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "tie_word_embeddings": True,
    },
    "Qwen3-8B": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "tie_word_embeddings": False,
    },
}
HEADS = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}


def reckoned_gib(shape: ModelShape, ranks: int) -> list[float]:
    """GiB of one GPU in the order of the table's columns, with a GiB for CUDA itself."""
    setting = memory.Setting(compute_bytes=2, tokens=8192, longest=2048, checkpointing=True, on_cpu=False, ranks=ranks)
    policy, value = memory.trained_model(shape, setting), memory.trained_model(shape, setting, scalar=True)
    needs = [
        memory.generator(shape, dtype="bfloat16", slots=64, longest=2048, prefill_tokens=2048),
        memory.scorer(shape, dtype="bfloat16", batch_tokens=16384, scalar=False),
        policy,
        value,
        memory.side_by_side(policy, value, on_cpu=False),
    ]
    return [need.total / 2**30 + 1 for need in needs]


@pytest.mark.parametrize("name", SHAPES)
def test_each_entry_is_what_the_doctor_reckons_and_fits(name: str, tmp_path: Path) -> None:
    (row,) = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| {name} |")]
    entries = [tuple(map(int, found)) for found in ENTRY.findall(row)]
    heads = HEADS | {"num_attention_heads": 32 if name == "Qwen3-8B" else 16}
    Qwen3Config(**SHAPES[name], **heads).save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path), None)
    assert len(entries) == 5
    for column, (gib, gpus, size) in enumerate(entries):
        need = reckoned_gib(shape, gpus)[column]
        assert round(need) == gib and need < FULL * size
        fewer = [count for count in GPUS if count < gpus]
        assert not fewer or reckoned_gib(shape, fewer[-1])[column] > FULL * size, "fewer GPUs would do"
