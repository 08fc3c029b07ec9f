"""Promises of the commands that run services, kept by the real command, real services and the small real model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from trimtab.rounds.launchers.services import free_ports

MODEL = Path(__file__).parents[2] / "examples" / "models" / "stories260K-hf"
TRIMTAB = (sys.executable, "-m", "trimtab")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def trimtab(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TRIMTAB, *arguments], input=stdin, capture_output=True, text=True, env=ENV, timeout=240, check=False
    )


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([*TRIMTAB, *arguments], stdout=subprocess.PIPE, text=True, env=ENV)
    try:
        with process:
            yield process
            process.kill()
    finally:
        process.kill()


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return
    raise AssertionError(f"{text!r} did not come; there was: {''.join(seen)}")


def up_file(folder: Path, **sections: dict[str, object]) -> tuple[Path, dict[str, str]]:
    """An up.yaml on free ports, and the address of each service."""
    addresses = {}
    for name, section in sections.items():
        section["port"], section["metrics_port"] = free_ports(2)
        addresses[name] = f"127.0.0.1:{section['port']}"
    path = folder / "up.yaml"
    path.write_text(yaml.safe_dump({"folder": str(folder), "store": str(folder / "store"), **sections}))
    return path, addresses


def demonstrations(folder: Path, count: int = 12) -> Path:
    path = folder / "stories.jsonl"
    names = ["Tim", "Mia", "Max"]
    rows = [{"prompt": "Once upon a time", "completion": f" {names[i % 3]} saw {i} birds."} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_up_serves_generate_prints_completions_and_sigterm_ends_all_with_0(tmp_path: Path) -> None:
    path, addresses = up_file(tmp_path, generator={"model": str(MODEL)})
    with running("up", "-c", str(path)) as up:
        wait_for(up, "generator: serving")
        arguments = ("generate", "--address", addresses["generator"], "--max-tokens", "8", "--temperature", "0")
        text = trimtab(*arguments, "Once upon a time")
        rows = trimtab(*arguments, "--json", "--n", "2", stdin='Once upon a time\n{"prompt": "One day"}\n')
        up.send_signal(signal.SIGTERM)
        assert up.wait(60) == 0
    assert text.stdout.startswith("Once upon a time, there was"), text.stderr
    parsed = [json.loads(line) for line in rows.stdout.splitlines()]
    assert [(r["prompt"], r["sample_index"]) for r in parsed] == [
        (prompt, sample) for prompt in ("Once upon a time", "One day") for sample in (0, 1)
    ]
    assert all(len(r["token_ids"]) == len(r["logprobs"]) == 8 for r in parsed)


def test_score_reads_what_generate_writes_and_chats_as_the_conversation_they_are(tmp_path: Path, make_tiny) -> None:
    path, addresses = up_file(tmp_path, reward={"model": str(make_tiny("reward"))})
    asked, answer = {"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}
    rows = [{"messages": [asked], "response": "w3"}, {"messages": [asked, answer]}, {"messages": [asked]}]
    with running("up", "-c", str(path)) as process:
        wait_for(process, f"reward: serving on {addresses['reward']}")
        at = ("--address", addresses["reward"])
        result = trimtab("score", "--file", "-", *at, stdin="".join(json.dumps(row) + "\n" for row in rows))
        spoken = trimtab("score", "--chat", "--prompt", "w1 w2", "w3", *at)
    assert result.returncode == 0 and spoken.returncode == 0, result.stderr + spoken.stderr
    generated, whole, unanswered = (line.split("\t")[0] for line in result.stdout.splitlines())
    assert generated == whole == spoken.stdout.split("\t")[0] != unanswered


def test_up_with_a_wrong_model_is_one_line_with_the_reason(tmp_path: Path) -> None:
    path, _ = up_file(tmp_path, generator={"model": str(tmp_path / "none")})
    result = trimtab("up", "-c", str(path))
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and f"{tmp_path / 'none'} is not a model folder" in result.stderr


def test_a_service_with_tls_is_supervised_and_reached_by_its_authority_only(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    options = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    command = ["openssl", *options.split(), "-addext", names, "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    section: dict[str, object] = {"model": str(MODEL), "tls_cert": str(cert), "tls_key": str(key)}
    path, addresses = up_file(tmp_path, generator=section)
    with running("up", "-c", str(path)) as up:
        wait_for(up, "generator: serving")
        arguments = ("generate", "--address", addresses["generator"], "--max-tokens", "4", "Once upon a time")
        assert trimtab(*arguments, "--tls-ca", str(cert)).stdout.startswith("Once upon a time")
        up.send_signal(signal.SIGTERM)
        assert up.wait(60) == 0


def test_a_token_never_travels_in_the_clear_to_another_machine(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\n")
    result = trimtab("generate", "--address", "192.0.2.1:1", "--token-file", str(tmp_path / "token"), "Hi")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and "needs TLS" in result.stderr


def test_train_starts_its_own_trainer_publishes_and_exits_0(tmp_path: Path) -> None:
    config = tmp_path / "sft.yaml"
    config.write_text(f"model: {MODEL}\ndata: {demonstrations(tmp_path)}\nepochs: 1\nbatch_size: 4\nmax_length: 64\n")
    store = str(tmp_path / "store")
    result = trimtab(
        "train", "sft", str(config), "--run-id", "first", "--store", store, "--folder", str(tmp_path / "runs")
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["step", "1/3"], ["step", "2/3"], ["step", "3/3"]]
    assert "loss=" in lines[0] and lines[-2:] == [
        "published 1 version(s), the newest first/policy@3",
        "run first succeeded at step 3",
    ]


def test_ctrl_c_stops_a_run_after_its_step(tmp_path: Path) -> None:
    config = tmp_path / "sft.yaml"
    data = demonstrations(tmp_path, 400)
    config.write_text(f"model: {MODEL}\ndata: {data}\nepochs: 50\nbatch_size: 2\nmax_length: 64\n")
    folders = ("--store", str(tmp_path / "store"), "--folder", str(tmp_path / "runs"))
    with running("train", "sft", str(config), "--run-id", "first", *folders) as train:
        wait_for(train, "step 3/")
        train.send_signal(signal.SIGINT)
        wait_for(train, "run first stopped at step")
        assert train.wait(60) == 130


def test_a_run_that_fails_says_why_in_one_line(tmp_path: Path) -> None:
    config = tmp_path / "sft.yaml"
    config.write_text(f"model: {tmp_path / 'none'}\ndata: {demonstrations(tmp_path)}\n")
    folders = ("--store", str(tmp_path / "store"), "--folder", str(tmp_path / "runs"))
    result = trimtab("train", "sft", str(config), "--run-id", "first", *folders)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and "is not a model folder" in result.stderr
