"""Print what some extras of a project need, without the projects themselves: requirements.py PYPROJECT … -- EXTRA …

The extras are those of the first project; of the others only what they always need is taken.
"""

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

OWN = re.compile(r"(trimtab|trimtab-client)(?:\[([^\]]*)\])?(?![\w-])")


def requirements(projects: list[dict[str, Any]], extras: list[str]) -> list[str]:
    """All requirements, sorted. KeyError for an extra that the first project does not have."""
    found = {one for project in projects for one in project["dependencies"]}
    optional = projects[0]["optional-dependencies"]
    wanted, seen = list(extras), set()
    while wanted:
        extra = wanted.pop()
        if extra in seen:
            continue
        seen.add(extra)
        for requirement in optional[extra]:
            own = OWN.match(requirement)
            if own:
                wanted += [name.strip() for name in (own.group(2) or "").split(",") if name.strip()]
            else:
                found.add(requirement)
    return sorted(one for one in found if not OWN.match(one))


if __name__ == "__main__":
    split = sys.argv.index("--")
    read = [tomllib.loads(Path(path).read_text())["project"] for path in sys.argv[1:split]]
    print("\n".join(requirements(read, sys.argv[split + 1 :])))
