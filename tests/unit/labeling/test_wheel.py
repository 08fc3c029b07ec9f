"""The wheel that users install holds everything that the pages serve, not only Python."""

import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[3]
ROOM = ROOT / "services" / "trimtab" / "labeling"


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> set[str]:
    """The names in a wheel built from this checkout."""
    [wheel] = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize(
    ("folder", "pattern", "fewest"),
    [
        ("web/templates", "*.html", 15),
        ("web/static/js", "*.js", 10),
        ("web/static/css", "*.css", 5),
        ("web/static", "*.svg", 1),
        ("translations", "*.json", 2),
        ("migrations", "*.mako", 1),
        ("migrations/versions", "*.py", 1),
        ("../gateway/dashboard/templates", "*.html", 5),
        ("../gateway/dashboard/static", "*.*", 6),
    ],
)
def test_pages_words_and_migrations_are_in_the_wheel(packed, folder, pattern, fewest):
    files = [path.relative_to(ROOT / "services").as_posix() for path in (ROOM / folder).resolve().glob(pattern)]
    assert len(files) >= fewest
    assert set(files) <= packed
