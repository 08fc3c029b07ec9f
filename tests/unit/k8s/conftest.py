"""Manifests are looked at here, not code: their hundreds of checks run without counting lines."""

import pytest

CODE = {"test_deploy", "test_deploy_command", "test_launcher"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "k8s" and item.path.stem not in CODE:
            item.add_marker(pytest.mark.no_cover)
