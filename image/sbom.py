"""Print what an image holds as a CycloneDX document: Python's packages of this environment, and Debian's."""

import json
import subprocess
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

BASE = Path("/usr/share/trimtab/packages.txt")
DEBIAN = "${Package}\t${Version}\t${Architecture}\t${db:Status-Status}\n"
BUILD_ONLY = {"pip", "setuptools"}


def python_components() -> list[dict[str, Any]]:
    """One component a distribution, with its licence where it names one."""
    components = []
    for one in distributions():
        name, version = one.metadata["Name"], one.version
        if name in BUILD_ONLY:
            continue
        component = {"type": "library", "name": name, "version": version, "purl": f"pkg:pypi/{name.lower()}@{version}"}
        licence = one.metadata.get("License-Expression")
        components.append(component | ({"licenses": [{"expression": licence}]} if licence else {}))
    return sorted(components, key=lambda component: component["purl"])


def debian_components() -> list[dict[str, Any]]:
    """One component a package that is installed in this stage's base; compilers of the build stage are left out."""
    listed = subprocess.run(["dpkg-query", "-W", "-f", DEBIAN], capture_output=True, text=True, check=True).stdout
    rows = [line.split("\t") for line in listed.splitlines()]
    base = base_packages()
    return [
        {"type": "library", "name": name, "version": version, "purl": f"pkg:deb/debian/{name}@{version}?arch={arch}"}
        for name, version, arch, status in rows
        if status == "installed" and name in base
    ]


def base_packages() -> set[str]:
    """The packages that the base and the stage `python` hold, as that stage wrote them down."""
    return set(BASE.read_text().split())


if __name__ == "__main__":
    components = python_components() + debian_components()
    print(
        json.dumps({"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "components": components}, indent=1)
    )
