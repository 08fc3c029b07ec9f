"""Users' type checkers know every type of the SDK: it is marked as typed, and nothing in it is left to be guessed."""

import json
import os
import subprocess
from pathlib import Path

import pytest

import trimtab_client

SOURCE = Path(trimtab_client.__file__).parent


@pytest.fixture(scope="module")
def report() -> dict:
    command = ["pyright", "--verifytypes", "trimtab_client", "--ignoreexternal", "--outputjson"]
    here = os.environ | {"PYTHONPATH": str(SOURCE.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=SOURCE.parent, env=here)
    return json.loads(done.stdout)["typeCompleteness"]


def test_the_package_is_marked_as_typed(report):
    assert (SOURCE / "py.typed").exists() and Path(report["pyTypedPath"]) == SOURCE / "py.typed"


def test_every_type_of_what_is_written_by_hand_is_known(report):
    assert len(report["symbols"]) > 500
    vague = [one["name"] for one in report["symbols"] if one["isExported"] and not one["isTypeKnown"]]
    # gRPC's own stubs leave the contexts of generated servicers open.
    assert [name for name in vague if not name.startswith("trimtab_client.v1.")] == []
