"""The Dockerfile says what the repository holds: its sources, its extras, its targets, a user who is not root."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TARGETS = ("model-server", "generator", "generator-vllm", "trainer", "web")
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = SETTINGS["project"]


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) in order, continuation lines joined, comments left out."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines()) if word]


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Each stage's base and own instructions."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for word, rest in instructions():
        if word == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()
            found[name] = (base, current := [])
        elif found:
            current.append((word, rest))
    return found


def lineage(target: str) -> list[tuple[str, str]]:
    """All instructions that a target's image is made of, from its base up."""
    known = stages()
    if target not in known:
        return []
    base, own = known[target]
    return [*lineage(base), *own]


def test_every_target_is_there():
    assert set(TARGETS) <= stages().keys()


def test_the_base_image_is_an_argument():
    first = instructions()[0]
    assert first[0] == "ARG" and first[1].startswith("BASE=")
    known = stages()
    assert {base for base, _ in known.values() if base not in known} == {"${BASE}"}


def test_every_copied_source_exists_and_travels_to_the_builder():
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    sent = [line[1:] for line in ignore if line.startswith("!")]
    assert "*" in ignore, "all but what is named stays here"
    for name, (_, own) in stages().items():
        for word, rest in own:
            if word != "COPY" or rest.startswith("--from="):
                continue
            *sources, _ = rest.split()
            for source in sources:
                assert (ROOT / source).exists(), (name, source)
                assert any(source == one or source.startswith(f"{one}/") for one in sent), (name, source)


def test_all_that_the_wheel_is_made_of_is_copied():
    wheel = SETTINGS["tool"]["hatch"]["build"]["targets"]["wheel"]
    parts = [*wheel["packages"], *wheel["force-include"], PROJECT["readme"], *PROJECT["license-files"]]
    copied = [source for word, rest in stages()["code"][1] if word == "COPY" for source in rest.split()[:-1]]
    copied += [source for word, rest in stages()["build"][1] if word == "COPY" for source in rest.split()[:-1]]
    for part in parts:
        assert any(part == one or part.startswith(f"{one}/") for one in copied), part


def test_every_stage_that_is_copied_from_exists():
    known = stages()
    for _, own in known.values():
        for word, rest in own:
            if word == "COPY" and rest.startswith("--from="):
                assert rest.split()[0].removeprefix("--from=") in known


def test_every_extra_that_is_installed_exists():
    asked = [rest.split()[1:] for _, own in stages().values() for word, rest in own if "environment.sh" in rest]
    assert len(asked) == len(TARGETS)
    assert {extra for extras in asked for extra in extras} <= PROJECT["optional-dependencies"].keys()


def test_requirements_are_those_of_the_extra_and_all_it_names():
    requirements = runpy.run_path(str(ROOT / "image" / "requirements.py"))["requirements"]
    client = tomllib.loads((ROOT / "clients" / "python" / "pyproject.toml").read_text())["project"]
    found = requirements([PROJECT, client], ["reward", "s3"])
    assert set(PROJECT["optional-dependencies"]["model"]) <= set(found)
    assert set(PROJECT["optional-dependencies"]["s3"]) <= set(found)
    assert set(client["dependencies"]) <= set(found)
    assert not any(one.startswith("trimtab") for one in found)
    with pytest.raises(KeyError):
        requirements([PROJECT, client], ["no-such-extra"])


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_trimtab_as_a_user_who_is_not_root(target):
    made_of = lineage(target)
    assert [rest for word, rest in made_of if word == "USER"][-1] == "10001:10001"
    assert [rest for word, rest in made_of if word == "ENTRYPOINT"] == ['["trimtab"]']
    assert any(word == "HEALTHCHECK" for word, _ in made_of)


@pytest.mark.parametrize("target", TARGETS)
def test_no_image_holds_a_compiler_or_grows_out_of_the_build_stage(target):
    for word, rest in lineage(target):
        if word == "RUN":
            assert not re.search(r"\b(gcc|g\+\+|clang|build-essential|python3-dev|python3-venv)\b", rest)
    known, stage = stages(), target
    while stage in known:
        assert stage != "build"
        stage = known[stage][0]


@pytest.mark.parametrize("target", TARGETS)
def test_labels_say_what_an_image_is_and_where_its_parts_are_listed(target):
    labels = " ".join(rest for word, rest in lineage(target) if word == "LABEL")
    for name in ("title", "description", "version", "revision", "licenses", "source"):
        assert f"org.opencontainers.image.{name}=" in labels
    assert 'org.trimtab.sbom="/opt/trimtab/sbom.cdx.json"' in labels
    assert "sbom.cdx.json" in (ROOT / "image" / "environment.sh").read_text()


def test_the_images_that_the_manifests_name_are_targets():
    named = set()
    for file in (ROOT / "k8s").rglob("*.yaml"):
        named |= set(re.findall(r"image: trimtab/([\w-]+)", file.read_text()))
    assert named and named <= set(TARGETS)
