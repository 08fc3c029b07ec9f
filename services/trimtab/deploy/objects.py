"""A cluster's objects by kubectl: what is there, what would change, what was applied. No object is interpreted here."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.deploy.render import Object, kubectl

CALL_TIMEOUT_S = 60
APPLY_TIMEOUT_S = 300
FIELD_MANAGER = "trimtab-deploy"
WARNING = re.compile(r"[IW]\d{4} ")  # what kubectl notes for itself


class KubectlError(RuntimeError):
    """kubectl refused; the message is its own words."""


@dataclass(frozen=True)
class Kubectl:
    """kubectl of one context; "" is the current one."""

    context: str = ""

    def get(self, kind: str, *, namespace: str = "", selector: str = "") -> list[Object]:
        """Objects of a kind; none where the cluster does not know the kind."""
        found = self._run(["get", kind, "-o", "json", *_in(namespace), *(["-l", selector] if selector else [])])
        if found.returncode:
            if "the server doesn't have a resource type" in found.stderr or "NotFound" in found.stderr:
                return []
            raise KubectlError(_words(found.stderr))
        page: dict[str, Any] = json.loads(found.stdout)
        return page.get("items", [page])

    def kinds(self) -> set[str]:
        """ "KIND.GROUP" of every kind that the cluster serves; the core group is ""."""
        found = self._run(["api-resources", "--no-headers", "-o", "wide"])
        if found.returncode and not found.stdout:
            raise KubectlError(_words(found.stderr))
        return {_kind_of(line) for line in found.stdout.splitlines() if line.strip()}

    def server_version(self) -> tuple[int, int]:
        """(major, minor)."""
        found = self._run(["version", "-o", "json"])
        if found.returncode:
            raise KubectlError(_words(found.stderr))
        version = json.loads(found.stdout).get("serverVersion")
        if version is None:
            raise KubectlError("the cluster does not answer")
        return int(version["major"]), int(version["minor"].rstrip("+"))

    def diff(self, text: str, *, force: bool = False) -> str:
        """What applying would change, as a unified diff; "" if nothing. KubectlError as `apply` raises it."""
        found = self._run(["diff", *_server_side(force), "-f", "-"], text, APPLY_TIMEOUT_S)
        if found.returncode > 1 or (found.returncode and not found.stdout):
            raise KubectlError(_words(found.stderr))
        return found.stdout

    def apply(self, text: str, *, force: bool = False) -> list[str]:
        """Apply server-side; the lines that kubectl says. KubectlError for a refusal or a conflict of owners."""
        found = self._run(["apply", *_server_side(force), "-f", "-"], text, APPLY_TIMEOUT_S)
        if found.returncode:
            raise KubectlError(_words(found.stderr))
        return found.stdout.splitlines()

    def delete(self, text: str) -> None:
        """Delete objects, and wait until they are gone; one that is not there is fine."""
        found = self._run(["delete", "--ignore-not-found", "-f", "-"], text, APPLY_TIMEOUT_S)
        if found.returncode:
            raise KubectlError(_words(found.stderr))

    def _run(
        self, args: Sequence[str], text: str | None = None, timeout_s: float = CALL_TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        context = ["--context", self.context] if self.context else []
        command = [kubectl(), *context, f"--request-timeout={CALL_TIMEOUT_S}s", *args]
        try:
            return subprocess.run(command, input=text, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired as error:
            raise KubectlError(f"kubectl {args[0]}: no answer within {timeout_s:g} s") from error


def _server_side(force: bool) -> list[str]:
    return ["--server-side", "--field-manager", FIELD_MANAGER, *(["--force-conflicts"] if force else [])]


def _in(namespace: str) -> list[str]:
    return ["-n", namespace] if namespace else []


def _words(text: str) -> str:
    said = " ".join(line for line in text.splitlines() if not WARNING.match(line))
    if "(Conflict)" in said or "conflict with" in said:
        said += "; --force takes the field over"
    return " ".join(said.split()).removeprefix("error: ") or "kubectl failed and said nothing"


def _kind_of(line: str) -> str:
    """`NAME SHORTNAMES APIVERSION NAMESPACED KIND VERBS` without the columns that may be empty."""
    words = line.split()
    place = next(i for i, word in enumerate(words) if word in ("true", "false"))
    group = words[place - 1].partition("/")[0] if "/" in words[place - 1] else ""
    return f"{words[place + 1]}.{group}"
