"""kill -9 of any part at any moment: in exact mode each run ends with the weights of the run that nobody killed."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.killing import MOMENTS, SERVICES, Kill, Site, ppo_config, random_kills, run_to_its_end, site
from trimtab_client.v1 import trainer_pb2

MODEL = Path(__file__).parents[2] / "examples" / "models" / "stories260K-hf"
STEPS = 6
SEEDS = range(100, 150)
KILLS = 2  # of a run: each costs a start of one or two services
WORDS = ("the", "cat", "dog", "girl", "boy", "was", "happy", "sad", "big", "little", "ran", "to", "park", "saw", "ball")


def sentences(count: int, seed: int) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, int(random.integers(4, 9)))) for _ in range(count)]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that work for the site in `folder`."""
    lines = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(folder) in line and entry.parent.name != str(os.getpid()):
            lines.append(line)
    return lines


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Site]:
    """All four services, deterministic; their processes are gone at the end."""
    from trimtab.models.policy import Policy
    from trimtab.models.scalar_head import ScalarModel

    folder = tmp_path_factory.mktemp("kill")
    reward_model = folder / "reward-model"
    ScalarModel.from_policy(Policy.load(str(MODEL)), seed=3).save(reward_model)
    with site(folder, MODEL, reward_model) as made:
        yield made
    assert processes_of(folder) == []


@pytest.fixture(scope="module")
def calm(place) -> tuple[trainer_pb2.PpoConfig, dict[str, str], list[dict]]:
    """The config, the final digests and the metrics of a run that nobody killed."""
    prompts = write_rows(place.folder / "prompts.jsonl", [{"prompt": text} for text in sentences(20, 0)])
    texts = write_rows(place.folder / "texts.jsonl", [{"text": text} for text in sentences(24, 1)])
    config = ppo_config(place, prompts, value_model=str(place.folder / "reward-model"), steps=STEPS)
    config.ptx_data, config.ptx_coefficient, config.ptx_batch_size = str(texts), 0.5, 2
    config.stage.model = str(MODEL)
    heard: list[str] = []
    status, _ = run_to_its_end(place, "calm", config, heard=heard.append)
    assert status.state == "succeeded", status.error
    assert all(any(activity.startswith(moment) for activity in heard) for moment in MOMENTS.values())
    return config, {name: place.digest("calm", name) for name in ("policy", "policy-ema")}, place.rows("calm")


def check_ppo_run_survives(place: Site, calm, kills: list[Kill], run_id: str) -> None:
    config, digests, rows = calm
    status, steps = run_to_its_end(place, run_id, config, kills)
    assert status.state == "succeeded", status.error
    assert {name: place.digest(run_id, name) for name in digests} == digests
    assert [row["step"] for row in place.rows(run_id)] == list(range(1, STEPS + 1))
    assert [step.step for step in steps] == list(range(1, STEPS + 1))
    for name in ("score_mean", "kl_nats_per_sequence", "beta", "loss_policy", "loss_value", "explained_variance"):
        assert [row[name] for row in place.rows(run_id)] == [row[name] for row in rows]
    samples = [row["step"] for row in place.rows(run_id, "samples.jsonl")]
    assert samples == [step for step in range(1, STEPS + 1) for _ in range(8)]
    check_no_torn_version(place, run_id)


def check_no_torn_version(place: Site, run_id: str) -> None:
    versions = place.store.versions(run_id)
    assert versions
    for manifest in versions:
        place.store.verify(manifest)


@pytest.mark.parametrize("seed", range(3))
def test_ppo_ends_with_the_same_weights_whoever_is_killed(place, calm, seed):
    check_ppo_run_survives(place, calm, random_kills(seed, STEPS, 1), f"killed-{seed}")


def test_the_fifty_seeds_kill_each_service_at_each_moment():
    kills = [kill for seed in SEEDS for kill in random_kills(seed, STEPS, KILLS)]
    struck = {(service, kill.moment) for kill in kills for service in kill.services}
    assert struck == {(service, moment) for service in SERVICES for moment in MOMENTS}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", SEEDS)
def test_ppo_ends_with_the_same_weights_over_fifty_seeds(place, calm, seed):
    check_ppo_run_survives(place, calm, random_kills(seed, STEPS, KILLS), f"killed-{seed}")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_supervised_stages_end_with_the_same_weights(place, stage):
    if stage == "sft":
        rows = [{"text": text} for text in sentences(40, 1)]
        data = write_rows(place.folder / "sft.jsonl", rows)
        config, name = trainer_pb2.SftConfig(data=str(data), epochs=20, batch_size=8, dropout=0.1), "policy"
    else:
        rows = [{"prompt": "once", "responses": sentences(4, 10 + i), "ranks": [1, 2, 3, 4]} for i in range(24)]
        data = write_rows(place.folder / "rankings.jsonl", rows)
        config, name = trainer_pb2.RewardModelConfig(data=str(data), epochs=25, batch_prompts=6), "reward"
    config.stage.model = str(MODEL)
    config.stage.optimizer.learning_rate = 1e-3
    config.stage.checkpoint_every_steps = 7
    status, _ = run_to_its_end(place, f"calm-{stage}", config)
    assert status.state == "succeeded" and status.total_steps == 100, status.error
    kills = [Kill(("trainer",), "training", 20, 0.02)]
    status, steps = run_to_its_end(place, f"killed-{stage}", config, kills)
    assert status.state == "succeeded", status.error
    assert place.digest(f"killed-{stage}", name) == place.digest(f"calm-{stage}", name)
    assert [row["step"] for row in place.rows(f"killed-{stage}")] == list(range(1, 101))
    assert [step.step for step in steps] == list(range(1, 101))
    check_no_torn_version(place, f"killed-{stage}")


@pytest.mark.slow
def test_with_staleness_no_step_is_counted_twice_and_no_completion_lost(place, calm):
    config = trainer_pb2.PpoConfig()
    config.CopyFrom(calm[0])
    config.max_staleness = 1
    kills = [Kill(("generator",), "generating", 2, 0.05), Kill(("trainer",), "training", 4, 0.05)]
    status, steps = run_to_its_end(place, "stale", config, kills)
    assert status.state == "succeeded", status.error
    assert [row["step"] for row in place.rows("stale")] == [step.step for step in steps] == list(range(1, STEPS + 1))
    assert all(0 <= row["staleness_mean"] <= 1 for row in place.rows("stale"))
    check_no_torn_version(place, "stale")


def test_a_service_that_never_comes_back_ends_the_run_with_its_reason_and_it_can_go_on(place, calm):
    config, digests, _ = calm
    missing = trainer_pb2.PpoConfig()
    missing.CopyFrom(config)
    missing.reward_address = "127.0.0.1:9"  # nobody serves there
    missing.service_timeout_s = 1.0
    heard: list[str] = []
    started = time.monotonic()
    status, _ = run_to_its_end(place, "lost", missing, heard=heard.append)
    assert time.monotonic() - started < 60
    assert status.state == "failed" and "the reward at 127.0.0.1:9 did not answer within 1 s" in status.error
    assert "start the run again" in status.error
    assert any("waiting for the reward at 127.0.0.1:9, 1 s at most" in activity for activity in heard)
    status, _ = run_to_its_end(place, "lost", config)
    assert status.state == "succeeded", status.error
    assert place.digest("lost") == digests["policy"]
