"""Importing the SDK: quick, and without what it does not need."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import trimtab_client

HEAVY = ("torch", "transformers", "trimtab", "pydantic", "pandas")
MEASURE = """
import time
before = time.process_time()
{statement}
print(time.process_time() - before)
import sys
print(*sorted(name.partition(".")[0] for name in sys.modules))
"""


def measure(statement: str) -> tuple[float, set[str]]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.format(statement=statement)], capture_output=True, text=True, check=True
    )
    seconds, names = done.stdout.splitlines()
    return float(seconds), set(names.split())


def test_importing_the_package_takes_less_than_300_ms_of_cpu():
    assert min(measure("import trimtab_client")[0] for _ in range(3)) < 0.3


@pytest.mark.parametrize("statement", ["import trimtab_client", "from trimtab_client import *"])
def test_no_torch_is_imported(statement):
    assert not measure(statement)[1] & set(HEAVY)


def test_versions_alone_need_no_grpc():
    assert "grpc" not in measure("from trimtab_client import ModelVersion, RaggedTokens")[1]


def test_every_public_name_is_there():
    assert {name for name in trimtab_client.__all__ if getattr(trimtab_client, name) is None} == set()
    assert set(trimtab_client.__all__) <= set(dir(trimtab_client))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = trimtab_client.Nothing


def test_type_checkers_and_python_see_the_same_names():
    tree = ast.parse(Path(trimtab_client.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert {name: f"trimtab_client.{module}" for name, module in trimtab_client._HOME.items()} == seen
    assert sorted(seen) == trimtab_client.__all__


def test_the_two_styles_have_the_same_methods_with_the_same_arguments():
    for name in ("Model", "Generator", "Reward", "Reference", "Trainer"):
        blocking = getattr(trimtab_client, f"{name}Client")
        awaited = getattr(trimtab_client, f"Async{name}Client")
        names = {key for key in dir(blocking) if not key.startswith("_")}
        assert names == {key for key in dir(awaited) if not key.startswith("_")}
        for method in filter(lambda key: callable(getattr(blocking, key)), names):
            mine, twin = inspect.signature(getattr(blocking, method)), inspect.signature(getattr(awaited, method))
            asked = str(twin.parameters).replace(" | AsyncIterable[R]", "")  # which a blocking client cannot read
            assert str(mine.parameters) == asked, f"{name}Client.{method}"


def test_every_example_of_the_readme_is_python():
    readme = Path(trimtab_client.__file__).parents[1] / "README.md"
    examples = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    assert examples
    for example in examples:
        compile(example, str(readme), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        for node in ast.walk(ast.parse(example)):
            if isinstance(node, ast.ImportFrom) and node.module == "trimtab_client":
                assert {alias.name for alias in node.names} <= set(trimtab_client.__all__)
