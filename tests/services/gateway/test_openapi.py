"""The OpenAPI description is true: schemathesis asks what it allows, and much that it does not, and finds nothing."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.services.gateway.conftest import Edge, gateway
from trimtab.gateway.access import NO_CREDENTIALS, ROLES

pytestmark = pytest.mark.asyncio(loop_scope="module")
CONFIG = Path(__file__).parent / "schemathesis.toml"
LONGEST_S = 300.0
"""Of a request: what is allowed includes thousands of samples, which take half a minute on a quiet machine."""


@pytest.fixture(scope="module")
async def patient_edge(upstreams) -> AsyncIterator[Edge]:
    async with gateway(**upstreams, timeout_s=LONGEST_S) as opened:
        yield opened


async def found_by_schemathesis(url: str, phases: str, examples: int, seed: int) -> tuple[int, str]:
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run", f"{url}/openapi.json"]
    options = [
        "--phases",
        phases,
        "--max-examples",
        str(examples),
        "--seed",
        str(seed),
        "--no-color",
        "--request-timeout",
        str(LONGEST_S),
    ]
    process = await asyncio.create_subprocess_exec(
        *command, *options, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await process.communicate()
    return process.returncode or 0, out.decode()


async def test_schemathesis_finds_nothing(patient_edge):
    code, report = await found_by_schemathesis(patient_edge.url, "examples,fuzzing", examples=4, seed=1)
    assert code == 0, report[-8000:]


@pytest.mark.slow
@pytest.mark.timeout(3600)
async def test_schemathesis_finds_nothing_in_many_examples(patient_edge):
    code, report = await found_by_schemathesis(
        patient_edge.url, "examples,coverage,fuzzing,stateful", examples=200, seed=2
    )
    assert code == 0, report[-8000:]


async def test_every_route_has_a_role_and_every_refusal_is_documented(edge):
    document = (await edge.http.get("/openapi.json")).json()
    assert set(document["paths"]) | {"/openapi.json"} == {path for path in ROLES if not path.startswith("/dashboard")}
    assert not NO_CREDENTIALS & set(document["paths"])
    for operations in document["paths"].values():
        for operation in operations.values():
            assert {"401", "403", "429", "503"} <= set(operation["responses"])
            assert operation["summary"] and operation["description"]


async def test_the_description_holds_examples_of_every_body(edge):
    document = (await edge.http.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if "requestBody" in operation:
                content = operation["requestBody"]["content"]["application/json"]
                schema = schemas[content["schema"]["$ref"].rpartition("/")[2]] if "$ref" in content["schema"] else {}
                assert "examples" in content or "examples" in schema, path


async def test_every_example_of_the_description_is_of_the_documented_form(edge):
    document = (await edge.http.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    asked = 0
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if "requestBody" not in operation:
                continue
            content = operation["requestBody"]["content"]["application/json"]
            named = [one["value"] for one in content.get("examples", {}).values()]
            reference = content["schema"].get("$ref", "").rpartition("/")[2]
            for example in named or schemas[reference]["examples"]:
                answer = await edge.http.post(path, json=example)
                assert answer.status_code in (200, 400), answer.text
                asked += 1
    assert asked >= 8


async def test_an_unknown_path_and_method_are_typed_refusals(edge):
    nowhere = await edge.http.get("/v1/nothing")
    assert nowhere.status_code == 404 and nowhere.json()["error"]["code"] == "NOT_FOUND"
    wrong = await edge.http.get("/v1/score")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
    assert "request_id" in wrong.json()["error"]
