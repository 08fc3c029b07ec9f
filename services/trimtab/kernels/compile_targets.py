"""Compiles every Triton kernel for GPUs that need not be there, and reads what the compiler made of it.

    python -m trimtab.kernels.compile_targets [--out FILE]

prints one JSON line a kernel and GPU generation, as `Compiled` has it: A100 (sm_80), H100 and H200 (sm_90), B200
(sm_100). Needs Triton alone, no driver and no GPU. Not for use under TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trimtab.kernels import triton_backward, triton_kl, triton_logits, triton_ppo, triton_stats
from trimtab.kernels.triton_tile import Tile, vetted_tile

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CAPABILITIES = (80, 90, 100)
POINTERS = {"target_ptr": "*i64", "logits_ptr": "*bf16", "dz_ptr": "*bf16", "e_ptr": "*bf16"}
TENSOR_CORES = {80: r"\bHMMA\b", 90: r"\bHGMMA\b", 100: r"\bUTC\w*MMA\b"}


@dataclass(frozen=True)
class Target:
    """One kernel to compile: for a GPU generation, an input dtype, a tile, and with or without bias and soft-cap."""

    kernel: str
    capability: int
    dtype: str
    tile: Tile
    softcap: float = 0.0


@dataclass(frozen=True)
class Compiled:
    """What came out.

    Attributes:
        stack_bytes: local memory of a thread, by the linker's account.
        spills: instructions that store to local memory; 0 where all values stay in registers.
        shared_bytes: shared memory of a program.
        tensor_core_instructions: matrix instructions of the generation (HMMA, HGMMA, UTC…MMA).
        bulk_copies: tensor-descriptor loads by the copy engine.
    """

    triton: str
    kernel: str
    capability: int
    dtype: str
    softcap: bool
    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    tensor_core_instructions: int
    bulk_copies: int


def targets(capabilities: Sequence[int] = CAPABILITIES) -> Iterator[Target]:
    """Every kernel with the tile it is launched with; over the head also with bias and soft-cap, and in float32."""
    for capability in capabilities:
        wide, narrow = (_tile(torch.bfloat16, capability, long_epilogue) for long_epilogue in (False, True))
        yield Target("statistics", capability, "bf16", wide)
        yield Target("statistics", capability, "bf16", narrow, softcap=30.0)
        yield Target("statistics", capability, "fp32", _tile(torch.float32, capability, False))
        yield Target("gradient", capability, "bf16", narrow)
        yield Target("gradient", capability, "bf16", narrow, softcap=30.0)
        yield Target("exponentials", capability, "bf16", wide)
        for kernel in ("merge", "logits", "logits gradient", "kl", "kl gradient"):
            yield Target(kernel, capability, "bf16", wide)


def compile_target(target: Target) -> Compiled:
    """Compile one kernel and disassemble it."""
    function, constants = _function(target), _constants(target)
    function_constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature = {name: _type(name, target) for name in function.arg_names}
    signature |= dict.fromkeys(function_constants, "constexpr")
    divisible = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(function.arg_names)
        if signature[name].startswith("*") or name == "D"
    }
    warps, stages = target.tile.warps, target.tile.stages
    if target.kernel not in ("statistics", "gradient", "exponentials"):
        warps, stages = (triton_kl if target.kernel.startswith("kl") else triton_logits).WARPS, 3
    compiled = triton.compile(
        ASTSource(fn=function, signature=signature, constexprs=function_constants, attrs=divisible),
        target=GPUTarget("cuda", target.capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    usage, assembly = _disassembled(compiled.asm["cubin"])
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    return Compiled(
        triton=triton.__version__,
        kernel=target.kernel,
        capability=target.capability,
        dtype=target.dtype,
        softcap=target.softcap > 0,
        registers=int(registers),
        stack_bytes=int(stack),
        spills=len(re.findall(r"\bSTL\b", assembly)),
        shared_bytes=compiled.metadata.shared,
        tensor_core_instructions=len(re.findall(TENSOR_CORES[target.capability], assembly)),
        bulk_copies=len(re.findall(r"\bUTMALDG\b", assembly)),
    )


def _tile(dtype: torch.dtype, capability: int, long_epilogue: bool) -> Tile:
    return vetted_tile(dtype, divmod(capability, 10), long_epilogue=long_epilogue)


def _function(target: Target) -> Any:
    return {
        "statistics": triton_stats.head_statistics_kernel,
        "gradient": triton_backward.head_gradient_kernel,
        "exponentials": triton_ppo.exponentials_kernel,
        "merge": triton_stats.merge_kernel,
        "logits": triton_logits.logit_statistics_kernel,
        "logits gradient": triton_logits.logit_gradient_kernel,
        "kl": triton_kl.kl_kernel,
        "kl gradient": triton_kl.kl_gradient_kernel,
    }[target.kernel]


def _constants(target: Target) -> dict[str, Any]:
    tile = target.tile
    return {
        "SPLITS": triton_stats.SPLITS,
        "SOFTCAP": target.softcap,
        "HAS_BIAS": target.softcap > 0,
        "REFERENCE_SOFTCAP": 0.0,
        "REFERENCE_HAS_BIAS": False,
        "BLOCK_N": triton_stats.MERGE_ROWS if target.kernel == "merge" else tile.block_n,
        "BLOCK_V": {"logits": triton_logits.BLOCK_V, "kl": triton_kl.BLOCK_V}.get(
            target.kernel.split()[0], tile.block_v
        ),
        "BLOCK_D": tile.block_d,
        "BULK_COPY": tile.bulk_copy,
        "UPCAST": False,
    }


def _type(name: str, target: Target) -> str:
    """Of a kernel's argument; all kernels name alike what is alike."""
    tile = target.tile
    if name in ("x_ND", "w_VD"):
        rows = tile.block_n if name == "x_ND" else tile.block_v
        return f"tensordesc<{target.dtype}[{rows},{tile.block_d}]>" if tile.bulk_copy else f"*{target.dtype}"
    if name.endswith("_ptr"):
        scratch = target.dtype if name in ("dz_ptr", "e_ptr", "bias_ptr") else POINTERS.get(name, "*fp32")
        return scratch if scratch.startswith("*") else f"*{scratch}"
    return "i32"


def _disassembled(cubin: bytes) -> tuple[str, str]:
    """Resource usage and assembly, by the tools that come with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = ([TOOLS / "cuobjdump", "-res-usage", file.name], [TOOLS / "nvdisasm", "-c", file.name])
        usage, assembly = (subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands)
    return usage, assembly


def main(arguments: list[str]) -> int:
    """Compile the targets; 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="also write the lines here")
    parser.add_argument("--capabilities", nargs="+", type=int, choices=CAPABILITIES, default=CAPABILITIES)
    options = parser.parse_args(arguments)
    out, lines = options.out, []
    for target in targets(options.capabilities):
        lines.append(json.dumps(asdict(compile_target(target))))
        print(lines[-1], flush=True)
    if out is not None:
        out.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
