"""`trimtab doctor` finds a recipe fit that is, and says of each thing that is not what to do; by the real command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from transformers import Qwen3Config
from typer.testing import CliRunner

from tests.services.test_commands import MODEL, running, trimtab, up_file, wait_for
from trimtab.cli.main import app
from trimtab.models.policy import Policy
from trimtab.models.scalar_head import ScalarModel

RECIPE_8B = Path(__file__).parents[2] / "examples" / "recipes" / "8b-8gpu"


def findings(*arguments: str, exit_code: int) -> dict[str, dict[str, str]]:
    result = CliRunner().invoke(app, ["doctor", "--json", *arguments])
    assert result.exit_code == exit_code, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert any(row["state"] == "failed" for row in rows) == bool(exit_code)
    assert all(row["fix"] for row in rows if row["state"] == "failed")
    return {row["check"]: row for row in rows}


def recipe(folder: Path, addresses: dict[str, str], **changes: object) -> Path:
    prompts = folder / "prompts.jsonl"
    prompts.write_text('{"prompt": "Once upon a time"}\n{"prompt": "One day"}\n')
    values = {"model": str(MODEL), "prompts": str(prompts), "max_length": 64, "max_new_tokens": 8}
    values |= {"batch_size": 8, "minibatch_size": 4, "steps": 1}
    values |= {f"{name}_address": address for name, address in addresses.items()}
    path = folder / "ppo.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return path


def test_a_fit_recipe_passes_with_a_dry_step_over_the_services_and_leaves_nothing_behind(tmp_path: Path) -> None:
    ScalarModel.from_policy(Policy.load(str(MODEL)), seed=0).save(tmp_path / "reward")
    up, addresses = up_file(
        tmp_path,
        generator={"model": str(MODEL)},
        reward={"model": str(tmp_path / "reward")},
        reference={"model": str(MODEL)},
    )
    path = recipe(tmp_path, addresses)
    with running("up", "-c", str(up)) as process:
        for _ in addresses:
            wait_for(process, ": serving")
        found = findings(str(path), "--store", str(tmp_path / "store"), exit_code=0)
        together = trimtab("doctor", str(path), str(up))
    assert {row["state"] for row in found.values()} == {"ok"}
    assert "260,032 parameters" in found[f"generator at {addresses['generator']}"]["detail"]
    assert "is that of generator, reward, reference" in found["tokenizers"]["detail"]
    assert "16 tokens sampled, scored" in found["dry PPO step"]["detail"]
    assert together.returncode == 0, together.stdout
    assert f"✓ generator at {addresses['generator']}: runs already" in together.stdout
    assert together.stdout.endswith("0 to put right\n")
    assert not (tmp_path / "store").exists()


def test_each_thing_that_would_stop_a_run_is_named_with_its_fix(tmp_path: Path, make_tiny) -> None:
    up, addresses = up_file(tmp_path, reward={"model": str(make_tiny("reward"))})
    (tmp_path / "store").write_text("not a folder")
    nowhere = {"generator": "127.0.0.1:1", "reference": "127.0.0.1:1"}
    path = recipe(tmp_path, addresses | nowhere, prompts=str(tmp_path / "none.jsonl"))
    with running("up", "-c", str(up)) as process:
        wait_for(process, "reward: serving")
        arguments = (str(path), "--store", str(tmp_path / "store"), "--gpus", "1", "--gpu-memory", "0.5GiB")
        found = findings(*arguments, exit_code=1)
    bad = {check: row["fix"] for check, row in found.items() if row["state"] == "failed"}
    assert "trimtab serve generator" in bad["generator at 127.0.0.1:1"]
    assert "score_text: true" in bad["tokenizers: reward"]
    assert "none.jsonl" in found["ppo: prompts"]["detail"] and "correct prompts" in bad["ppo: prompts"]
    assert "may write to" in bad[f"store {tmp_path / 'store'}"]
    assert "GiB short" in found["ppo on cuda:0"]["detail"]
    assert found["dry PPO step"]["state"] == "skipped"


def test_a_wrong_key_is_a_finding_with_the_key_that_was_meant(tmp_path: Path) -> None:
    path = recipe(tmp_path, {}, clip_rnage=0.2)
    found = findings(str(path), exit_code=1)
    assert "did you mean 'clip_range'" in found["recipe"]["detail"]


@pytest.mark.slow
def test_the_8b_recipe_fits_on_eight_gpus_of_80_gib_and_not_on_fewer_or_smaller_ones(tmp_path: Path) -> None:
    shape = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
    grouped = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "tie_word_embeddings": False}
    Qwen3Config(**shape, **grouped).save_pretrained(tmp_path)  # as Qwen/Qwen3-8B has it

    def short(memory: str, ranks: int, *files: str) -> list[str]:
        paths = [str(RECIPE_8B / name) for name in files]
        options = ("--gpus", "8", "--gpu-memory", memory, "--torchrun", f"--nproc-per-node {ranks}")
        result = CliRunner().invoke(app, ["doctor", "--json", *paths, *options, "--like", str(tmp_path)])
        rows = [json.loads(line) for line in result.stdout.splitlines()]
        assert any(" on cuda:" in row["check"] and row["state"] == "ok" for row in rows), result.output
        return [row["check"] for row in rows if row["state"] == "failed" and " on cuda:" in row["check"]]

    assert short("80GiB", 6, "ppo.yaml", "up.yaml") == []
    assert short("80GiB", 8, "sft.yaml") == short("80GiB", 8, "reward.yaml") == []
    assert short("80GiB", 4, "ppo.yaml", "up.yaml") == [f"ppo on cuda:{n}" for n in range(4)]
    assert "ppo on cuda:6" in short("40GiB", 6, "ppo.yaml", "up.yaml")


def test_a_recipe_of_rounds_is_examined_as_a_whole(tmp_path: Path) -> None:
    source = Path(__file__).parents[2] / "examples" / "rounds" / "stories.yaml"
    found = findings(str(source), "--store", str(tmp_path / "store"), exit_code=1)  # its data is not prepared
    assert {"memory of sft", "memory of reward", "memory of ppo", "memory of the generator"} <= found.keys()
    assert found["sft: data"]["state"] == "failed" and "reward: data" not in found
