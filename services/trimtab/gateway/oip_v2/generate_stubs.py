"""Generate the stubs of this folder from open_inference_grpc.proto, the protocol's own file (Apache-2.0, unchanged).

`python generate_stubs.py` writes; `python generate_stubs.py --check` exits 1 if the files differ.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAME = "open_inference_grpc"
PACKAGE = "trimtab.gateway.oip_v2"


def generate(folder: Path) -> dict[str, str]:
    """Return {file name: text} of every generated stub."""
    outputs = [f"--{kind}_out={folder}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{HERE}", *outputs, f"{HERE / NAME}.proto"]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    own = f"import {NAME}_pb2", f"from {PACKAGE} import {NAME}_pb2"
    return {path.name: path.read_text().replace(*own) for path in sorted(folder.iterdir())}


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        fresh = generate(Path(folder))
    if "--check" not in sys.argv:
        for name, text in fresh.items():
            (HERE / name).write_text(text)
        return 0
    stale = [name for name, text in fresh.items() if not (HERE / name).exists() or (HERE / name).read_text() != text]
    if stale:
        print("stale stubs, run `make protos`:", ", ".join(stale))
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
