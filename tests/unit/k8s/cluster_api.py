"""A Kubernetes API over real HTTP, what kubectl needs of it for `trimtab deploy`: discovery, get, server-side apply.

Who applied a field last owns it: another manager's is a conflict unless forced. There are no controllers: a test says
what statuses the workloads have (`rolled_out`).
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from trimtab.deploy.render import Object

VERBS = ["create", "delete", "get", "list", "patch", "watch"]
ALWAYS = (("v1", "Pod"), ("v1", "Node"), ("v1", "Secret"), ("v1", "Namespace"), ("storage.k8s.io/v1", "StorageClass"))
CLUSTER_WIDE = {"Namespace", "Node", "StorageClass", "PriorityClass"}


def plural(kind: str) -> str:
    lower = kind.lower()
    if lower.endswith("y") and not lower.endswith("ay"):
        return f"{lower[:-1]}ies"
    return f"{lower}es" if lower.endswith("s") else f"{lower}s"


class ClusterApi:
    """Objects by (group and version, plural, namespace, name)."""

    def __init__(self, kinds: set[tuple[str, str]], version: str) -> None:
        self.kinds = {(group, plural(kind)): kind for group, kind in (*ALWAYS, *kinds)}
        self.version = version
        self.objects: dict[tuple[str, str, str, str], Object] = {}
        self.owners: dict[tuple[str, str, str, str], dict[str, str]] = {}
        self.controller: Callable[[Object], None] = lambda one: None
        self.immutable: set[str] = set()
        self.lock = threading.Lock()

    def put(self, one: Object) -> None:
        """Have an object as a controller or another user would."""
        meta = one["metadata"]
        key = (one["apiVersion"], plural(one["kind"]), meta.get("namespace", ""), meta["name"])
        with self.lock:
            self.objects[key] = one

    def find(self, kind: str, name: str) -> Object:
        return next(
            one for key, one in self.objects.items() if key[1] == plural(kind) and one["metadata"]["name"] == name
        )

    def apply(self, key: tuple[str, str, str, str], body: Object, manager: str, *, force: bool, dry: bool) -> Object:
        """Server-side apply; ValueError with the API's words where another manager owns a field with another value."""
        with self.lock:
            found = self.objects.get(key)
            owners = dict(self.owners.get(key, {}))
            before, wanted = dict(_leaves(found or {})), dict(_leaves(body))
            if found and body["kind"] in self.immutable and found["spec"] != body["spec"]:
                raise PermissionError(f"{body['kind']} {body['metadata']['name']} is invalid: field is immutable")
            for path, value in wanted.items():
                other = owners.get(path)
                if other not in (None, manager) and before.get(path) != value and not force:
                    raise ValueError(f'Apply failed with 1 conflict: conflict with "{other}": {path}')
                owners[path] = manager
            merged = copy.deepcopy(body)
            generation = (found or {}).get("metadata", {}).get("generation", 0) + (before != wanted)
            merged["metadata"] |= {"uid": "uid", "generation": generation}
            merged |= {"status": found["status"]} if found and "status" in found else {}
            if not dry:
                self.objects[key], self.owners[key] = merged, owners
            return merged


def rolled_out(one: Object) -> None:
    """The status of a workload whose pods are all there."""
    if one["kind"] in ("Deployment", "StatefulSet"):
        names = ("replicas", "updatedReplicas", "availableReplicas", "readyReplicas")
        counts = dict.fromkeys(names, one["spec"].get("replicas", 1))
        one["status"] = {"observedGeneration": one["metadata"]["generation"], **counts}


@contextmanager
def serving_cluster(
    folder: Path, kinds: set[tuple[str, str]], version: str = "1.36"
) -> Iterator[tuple[ClusterApi, Path]]:
    """(ClusterApi, path of a kubeconfig for it); `kinds` are (apiVersion, kind) beside the built-in few."""
    api = ClusterApi(kinds, version)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"api": api}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "it", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "contexts": [{"name": "it", "context": {"cluster": "it", "user": ""}}],
        "current-context": "it",
    }
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    try:
        yield api, path
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    api: ClusterApi
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        page = self._discovery(split.path.strip("/"))
        if page is not None:
            self._answer(200, page)
            return
        place = self._place(split.path)
        if place is None:
            self._refuse(404, "NotFound")
            return
        group, plural_, namespace, name = place
        with self.api.lock:
            if name:
                found = self.api.objects.get(place)
            else:
                own = [o for k, o in self.api.objects.items() if k[:2] == (group, plural_) and namespace in ("", k[2])]
                found = {"apiVersion": group, "kind": f"{self.api.kinds[(group, plural_)]}List", "items": own}
        self._answer(200, found) if found is not None else self._refuse(404, "NotFound")

    def do_PATCH(self) -> None:
        assert self.headers["Content-Type"] == "application/apply-patch+yaml"
        split = urlsplit(self.path)
        body = yaml.safe_load(self.rfile.read(int(self.headers["Content-Length"])))
        query = {key: values[0] for key, values in parse_qs(split.query).items()}
        place, dry = self._place(split.path), "dryRun" in query
        if place is None:
            self._refuse(404, "NotFound")
            return
        try:
            one = self.api.apply(place, body, query["fieldManager"], force=query.get("force") == "true", dry=dry)
        except ValueError as error:
            self._refuse(409, "Conflict", str(error))
            return
        except PermissionError as error:
            self._refuse(422, "Invalid", str(error))
            return
        if not dry:
            self.api.controller(one)
        self._answer(200, one)

    def do_DELETE(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        place = self._place(urlsplit(self.path).path)
        with self.api.lock:
            found = self.api.objects.pop(place, None) if place else None
        if found is None:
            self._refuse(404, "NotFound")
            return
        self._answer(200, {"kind": "Status", "apiVersion": "v1", "status": "Success"})

    def _place(self, path: str) -> tuple[str, str, str, str] | None:
        parts = path.strip("/").split("/")
        group = "v1" if parts[0] == "api" else "/".join(parts[1:3])
        rest = parts[2:] if parts[0] == "api" else parts[3:]
        namespace = ""
        if len(rest) > 2 and rest[0] == "namespaces":
            namespace, rest = rest[1], rest[2:]
        if not rest or (group, rest[0]) not in self.api.kinds:
            return None
        return group, rest[0], namespace, rest[1] if len(rest) > 1 else ""

    def _discovery(self, path: str) -> Object | None:
        major, minor = self.api.version.split(".")
        groups = sorted({group for group, _ in self.api.kinds if "/" in group})
        if path == "version":
            return {"major": major, "minor": minor, "gitVersion": f"v{major}.{minor}.0"}
        if path == "api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "apis":
            listed = [{"groupVersion": group, "version": group.split("/")[1]} for group in groups]
            named = [{"name": one["groupVersion"].split("/")[0], "versions": [one]} for one in listed]
            return {"kind": "APIGroupList", "groups": [one | {"preferredVersion": one["versions"][0]} for one in named]}
        group = path.removeprefix("openapi/v3/").removeprefix("apis/").removeprefix("api/")
        if path == "openapi/v3":
            urls = {("api/v1" if g == "v1" else f"apis/{g}") for g in ("v1", *groups)}
            return {"paths": {url: {"serverRelativeURL": f"/openapi/v3/{url}"} for url in urls}}
        own = {name: kind for (g, name), kind in self.api.kinds.items() if g == group}
        if path.startswith("openapi/v3/"):
            return {"openapi": "3.0.0", "paths": {f"/{name}": _patch(group, kind) for name, kind in own.items()}}
        if path in (f"api/{group}", f"apis/{group}") and own:
            shown = [
                {"name": name, "singularName": "", "namespaced": k not in CLUSTER_WIDE, "kind": k, "verbs": VERBS}
                for name, k in own.items()
            ]
            return {"kind": "APIResourceList", "groupVersion": group, "resources": shown}
        return None

    def _answer(self, code: int, value: Object) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, code: int, reason: str, message: str = "") -> None:
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason}
        self._answer(code, status | {"message": message or "not found"})

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _patch(group: str, kind: str) -> Object:
    """What tells kubectl that the server validates fields itself."""
    name, _, version = group.rpartition("/")
    of = {"group": name, "version": version, "kind": kind}
    parameters = [{"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}]
    found = {"x-kubernetes-group-version-kind": of, "x-kubernetes-action": "patch", "parameters": parameters}
    return {"patch": {**found, "responses": {"200": {"description": "OK"}}}}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, value) of every field; items of a list by their names where they have some."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            if path or key not in ("status", "apiVersion", "kind"):
                yield from _leaves(inner, f"{path}.{key}")
    elif isinstance(value, list) and value:
        for number, inner in enumerate(value):
            name = inner.get("name", number) if isinstance(inner, dict) else number
            yield from _leaves(inner, f"{path}[{name}]")
    elif path not in (".metadata.uid", ".metadata.generation"):
        yield path, json.dumps(value)
