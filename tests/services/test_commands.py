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

from tests.services.authority import LOOPBACK, Authority
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


def test_services_with_tls_and_keys_are_supervised_and_open_to_those_who_show_one(tmp_path: Path) -> None:
    authority = Authority.make(tmp_path / "authority")
    cert, key = authority.issue("server", LOOPBACK)
    keys = tmp_path / "keys.yaml"
    for name, role in (("maker", "generate"), ("judge", "score")):
        made = trimtab("keys", "add", name, "--role", role, "--file", str(keys), "--out", str(tmp_path / name))
        assert made.returncode == 0 and made.stdout == "", made.stderr
    path, addresses = up_file(tmp_path, generator={"model": str(MODEL)})
    content = yaml.safe_load(path.read_text())
    content["shared"] = {"tls_cert": str(cert), "tls_key": str(key), "auth": {"keys_file": str(keys)}}
    path.write_text(yaml.safe_dump(content))
    at = ("generate", "--address", addresses["generator"], "--max-tokens", "4", "Once upon a time")
    ca = ("--tls-ca", str(authority.ca))

    def refused(*flags: str) -> str:
        result = trimtab(*at, *flags)
        assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
        return result.stderr

    with running("up", "-c", str(path)) as up:
        wait_for(up, "generator: serving")
        done = trimtab(*at, *ca, "--token-file", str(tmp_path / "maker"))
        assert done.stdout.startswith("Once upon a time"), done.stderr
        assert "wants a key" in refused(*ca)
        assert "key:judge lacks the role 'generate'" in refused(*ca, "--token-file", str(tmp_path / "judge"))
        assert "it may want TLS" in refused()
        assert "authorities given" in refused("--tls-ca", str(Authority.make(tmp_path / "other").ca))
        assert trimtab("keys", "revoke", "maker", "--file", str(keys)).returncode == 0
        assert "not known" in refused(*ca, "--token-file", str(tmp_path / "maker"))
        up.send_signal(signal.SIGTERM)
        assert up.wait(60) == 0
    log = (tmp_path / "generator.log").read_text()
    tokens = [(tmp_path / name).read_text().strip() for name in ("maker", "judge")]
    assert not any(token in log for token in tokens)


def test_keys_are_listed_without_secrets_and_changes_are_noted_with_who_and_when(tmp_path: Path) -> None:
    keys = str(tmp_path / "keys.yaml")
    made = trimtab("keys", "add", "anna", "--role", "score", "--role", "label", "--days", "30", "--file", keys)
    token = made.stdout.strip()
    assert token.startswith("tt_") and "anna" in made.stderr
    again = trimtab("keys", "add", "anna", "--role", "score", "--file", keys)
    assert again.returncode == 1 and "there is a key named anna" in again.stderr and again.stderr.count("\n") == 1
    wrong = trimtab("keys", "add", "bob", "--role", "fly", "--file", keys)
    assert wrong.returncode == 1 and "role: fly; there are admin" in wrong.stderr
    listed = trimtab("keys", "list", "--file", keys).stdout
    assert "anna\tscore,label" in listed and token.split("_")[1] in listed and token not in listed
    trimtab("keys", "revoke", "anna", "--file", keys)
    assert trimtab("keys", "list", "--file", keys).stdout == ""
    text = (tmp_path / "keys.audit.jsonl").read_text()
    acts = [json.loads(line) for line in text.splitlines()]
    assert [act["what"] for act in acts] == ["keys add", "keys revoke"] and token not in text
    assert all(act["who"].startswith("operator:") and act["when"] and "anna" in act["target"] for act in acts)


def test_who_may_label_is_noted_with_who_and_when_and_no_token(tmp_path: Path) -> None:
    database = ("--database", str(tmp_path / "labels.sqlite"))
    tokens = [
        trimtab("label", "labeler", "add", "ann", "--role", "lead", *database).stdout.strip(),
        trimtab("label", "labeler", "token", "ann", *database).stdout.strip(),
    ]
    assert all(tokens) and trimtab("label", "labeler", "add", "ann", *database).returncode == 1
    trimtab("label", "labeler", "delete", "ann", "--yes", *database)
    text = (tmp_path / "labels.audit.jsonl").read_text()
    acts = [json.loads(line) for line in text.splitlines()]
    assert [(act["what"], act["target"]) for act in acts] == [
        ("labeler add", "ann: lead"),
        ("labeler token", "ann"),
        ("labeler delete", "ann"),
    ]
    assert all(act["who"].startswith("operator:") and act["when"] for act in acts)
    assert not any(token in text for token in tokens)


def test_no_service_listens_beyond_this_machine_in_the_clear_unless_told_to(tmp_path: Path) -> None:
    refused = trimtab("serve", "trainer", "--host", "0.0.0.0", "--port", "0", "--store", str(tmp_path / "s"))
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert "give tls_cert and tls_key, or insecure: true" in refused.stderr
    cert, key = Authority.make(tmp_path / "authority").issue("server", LOOPBACK)
    at = ("serve", "trainer", "--host", "0.0.0.0", "--port", "0", "--store", str(tmp_path / "s"))
    open_to_all = trimtab(*at, "--tls-cert", str(cert), "--tls-key", str(key))
    assert open_to_all.returncode == 1 and "everybody may call" in open_to_all.stderr


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
