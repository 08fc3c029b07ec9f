"""Which way is fast on which CPU, and how numbers of rows are rounded."""

import pytest
import torch

from trimtab.models import cpu

XEON = ["GenuineIntel", "avx512_bf16", "amx_bf16"]
EPYC = ["AuthenticAMD", "avx512_bf16"]


def test_rounding_adds_an_eighth_at_most_and_leaves_few_numbers():
    rounded = {count: cpu.rounded_rows(count) for count in range(1, 5000)}
    assert all(count <= rows <= max(count + 3, count * 9 / 8) for count, rows in rounded.items())
    assert all(cpu.rounded_rows(rows) == rows for rows in rounded.values())
    assert {rows for rows in rounded.values() if 512 < rows <= 1024} == set(range(576, 1025, 64))


@pytest.mark.parametrize(
    ("words", "dtype", "compiles", "fuses", "fuses_with_gradients"),
    [
        (XEON, torch.bfloat16, True, True, False),
        (XEON, torch.float32, False, True, True),
        (EPYC, torch.bfloat16, True, False, False),
        (EPYC, torch.float32, False, False, False),
        ([], torch.bfloat16, False, False, False),
        (XEON, torch.float64, False, False, False),
    ],
)
def test_the_fast_way_of_a_machine(words, dtype, compiles, fuses, fuses_with_gradients, monkeypatch):
    monkeypatch.setattr(cpu, "_words", lambda: frozenset(words))
    assert cpu.compiles_by_shape(dtype) is compiles
    assert cpu.fuses_attention(dtype, gradients=False) is fuses
    assert cpu.fuses_attention(dtype, gradients=True) is fuses_with_gradients


def test_a_machine_without_cpuinfo_is_taken_for_a_plain_one(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "none")
    cpu._words.cache_clear()
    try:
        assert not (cpu.is_intel() or cpu.has_amx() or cpu.compiles_by_shape(torch.bfloat16))
    finally:
        cpu._words.cache_clear()
