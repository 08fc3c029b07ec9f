from collections.abc import Callable
from pathlib import Path

import pytest

from trimtab.weights.errors import InvalidNameError, VersionNotFoundError
from trimtab.weights.sources import PlainSource, VersionReference, parse_reference, parse_source, resolve_source
from trimtab.weights.store import Store
from trimtab_client import ModelVersion

MakeFolder = Callable[..., Path]


@pytest.mark.parametrize(
    ("source", "parsed"),
    [
        ("version:run-1/policy", VersionReference("run-1", "policy", None)),
        ("version:run.1/reward@0", VersionReference("run.1", "reward", 0)),
        ("version:a/b@000042", VersionReference("a", "b", 42)),
        ("version:a/b@999999999999", VersionReference("a", "b", 999_999_999_999)),
        ("org/model", PlainSource("org/model")),
        ("./models/version:x", PlainSource("./models/version:x")),
        ("/abs/folder@1", PlainSource("/abs/folder@1")),
    ],
)
def test_sources_are_read_as_people_write_them(source: str, parsed: VersionReference | PlainSource) -> None:
    assert parse_source(source) == parsed


@pytest.mark.parametrize(
    "source",
    [
        "",
        "  ",
        "version:",
        "version:run",
        "version:run/",
        "version:/policy",
        "version:a/b/c",
        "version:../b",
        "version:a/..",
        "version:a/b@",
        "version:a/b@x",
        "version:a/b@-1",
        "version:a/b@1.5",
        "version:a/b@1@2",
        "version:a/b@1000000000000",
        "version:a/b@\u0661",
        "version:a/b@1\n",
        "version: a/b",
    ],
)
def test_a_source_that_is_not_one_is_refused(source: str) -> None:
    with pytest.raises(InvalidNameError, match=r"is not a version|is not allowed|is empty"):
        parse_source(source)


def test_references_print_as_they_are_read() -> None:
    for text in ("run/policy", "run/policy@7"):
        assert str(parse_reference(text)) == text


def test_a_published_source_resolves_to_verified_files_and_its_version(
    store: Store, make_folder: MakeFolder, tmp_path: Path
) -> None:
    first = store.publish(make_folder(seed=1), run_id="r", name="policy", step=1)
    second = store.publish(make_folder(seed=2), run_id="r", name="policy", step=2)
    newest = resolve_source("version:r/policy", store, tmp_path / "cache")
    assert (newest.version, newest.manifest) == (second.version, second)
    assert (Path(newest.path_or_id) / "config.json").read_text() == '{"seed": 2}'
    older = resolve_source("version:r/policy@1", store, tmp_path / "cache")
    assert older.version == first.version
    assert (Path(older.path_or_id) / "config.json").read_text() == '{"seed": 1}'
    store.set_current("r", "policy", 1)
    assert resolve_source("version:r/policy", store, tmp_path / "cache").version == first.version


@pytest.mark.parametrize("source", ["org/model", "./some/folder", "gpt2"])
def test_folders_and_hub_ids_pass_through(source: str) -> None:
    resolved = resolve_source(source, None)
    assert resolved.path_or_id == source
    assert resolved.version == ModelVersion(run_id="", name=source, step=0, digest="")
    assert resolved.manifest is None


def test_a_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert resolve_source("~/model", None).path_or_id == "/home/someone/model"


def test_what_cannot_be_resolved_says_why(store: Store, make_folder: MakeFolder) -> None:
    with pytest.raises(InvalidNameError, match=r"version:r/policy needs a store: .*--store or TRIMTAB_STORE"):
        resolve_source("version:r/policy", None)
    with pytest.raises(VersionNotFoundError, match="nothing is current under r/policy"):
        resolve_source("version:r/policy", store)
    store.publish(make_folder(), run_id="r", name="policy", step=1, set_current=False)
    with pytest.raises(VersionNotFoundError, match="nothing is current under r/policy"):
        resolve_source("version:r/policy", store)
    with pytest.raises(VersionNotFoundError, match="its steps are 1"):
        resolve_source("version:r/policy@3", store)
