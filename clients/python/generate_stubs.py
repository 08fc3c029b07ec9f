"""Generate the gRPC stubs of trimtab_client/v1 from protos/ (needs grpcio-tools and mypy-protobuf).

Python imports in generated code follow the proto path (trimtab/v1), not the folder the code is
put in, so the import lines, and only those, are rewritten to trimtab_client.v1.

`python generate_stubs.py` writes; `python generate_stubs.py --check` exits 1 if the files differ.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROTOS = ROOT / "protos"
TARGET = Path(__file__).resolve().parent / "trimtab_client" / "v1"
IMPORT = re.compile(r"^(from|import) trimtab\.v1\b|(?<=^from )trimtab(?= import v1)", re.MULTILINE)


def generate(folder: Path) -> dict[str, str]:
    """Return {file name: text} of every generated stub."""
    protos = sorted(path.relative_to(PROTOS) for path in PROTOS.rglob("*.proto"))
    outputs = [f"--{kind}_out={folder}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", *outputs, *map(str, protos)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return {
        path.name: IMPORT.sub(lambda m: m.group(0).replace("trimtab", "trimtab_client"), path.read_text())
        for path in sorted((folder / "trimtab" / "v1").iterdir())
        if path.suffix in {".py", ".pyi"}
    }


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        fresh = generate(Path(folder))
    fresh["__init__.py"] = '"""Generated from protos/trimtab/v1; do not edit."""\n'
    if "--check" in sys.argv:
        present = {path.name: path.read_text() for path in TARGET.iterdir() if path.is_file()}
        stale = sorted(name for name in fresh.keys() | present.keys() if fresh.get(name) != present.get(name))
        if stale:
            print("stale stubs, run `make protos`:", ", ".join(stale))
        return int(bool(stale))
    TARGET.mkdir(exist_ok=True)
    for path in TARGET.iterdir():
        if path.is_file():
            path.unlink()
    for name, text in fresh.items():
        (TARGET / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
