"""The generator on vLLM, for real: `make test-vllm` runs it in an environment of its own, elsewhere it is skipped."""

from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = pytest.mark.skip(reason="vLLM is not installed here; `make test-vllm` runs this")
    for item in items:
        if item.path.is_relative_to(HERE):
            # Starting vLLM takes a quarter of a minute, and much longer on a busy machine.
            item.add_marker(pytest.mark.timeout(900))
            if find_spec("vllm") is None:
                item.add_marker(missing)
