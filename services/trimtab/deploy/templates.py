"""Templates of runs that a cluster has and cannot be changed: a JobSet's spec stays as it was made.

They make no pods themselves (suspended), so one that differs is removed and made anew; runs keep what they began with.
"""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from trimtab.deploy.objects import Kubectl, KubectlError
from trimtab.deploy.render import Object

TEMPLATE = "trimtab.dev/template"
REFUSAL = "is immutable"


def made_anew(kubectl: Kubectl, objects: Sequence[Object], *, force: bool = False) -> list[Object]:
    """The templates that the cluster refuses to change into these. KubectlError for any other refusal."""
    found = []
    for one in objects:
        if TEMPLATE not in one["metadata"].get("annotations", {}):
            continue
        try:
            kubectl.diff(yaml.safe_dump(one), force=force)
        except KubectlError as error:
            if REFUSAL not in str(error):
                raise
            found.append(one)
    return found
