"""Images built for real with buildah, then run: skipped with a reason where buildah or a base image is missing.

TRIMTAB_IMAGE_BASE names a base as `buildah pull` takes it (oci-archive:FILE, a registry's name); without it debootstrap
makes one that fetches packages as this machine does: with its certificate authorities and PIP_FIND_LINKS.
TRIMTAB_IMAGE_TARGETS (web by default) says which targets are built; those with torch load several hundred megabytes.
BUILDAH_ARGUMENTS go to the build. Everything lies under pytest's temporary folder and is removed at the end.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trimtab.rounds.launchers.services import free_ports

ROOT = Path(__file__).parents[2]
TARGETS = os.environ.get("TRIMTAB_IMAGE_TARGETS", "web").split(",")
MIB, GIB = 1 << 20, 1 << 30
MOST_BYTES = {  # with torch for CPUs
    "web": 600 * MIB,
    "model-server": 2 * GIB,
    "generator": 2 * GIB,
    "trainer": 3 * GIB,
    "generator-vllm": 7 * GIB,
}
AUTHORITIES = Path("/usr/local/share/ca-certificates")
WHEELS = os.environ.get("PIP_FIND_LINKS", "")  # folders or addresses, as pip takes them
CANNOT_SERVE = {"trainer": "the trainer's image runs jobs", "generator-vllm": "vLLM's wheels want a GPU"}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(shutil.which("buildah") is None, reason="no buildah: apt-get install buildah"),
    pytest.mark.skipif(os.getuid() != 0, reason="buildah's chroot isolation needs root here"),
]


class Buildah:
    """buildah with storage of its own, chroot isolation, and no registry.

    Storage is overlayfs where kernel and file system have it, else whole copies of every layer, many times the disk.
    """

    def __init__(self, folder: Path) -> None:
        self._storage = self._in(folder / "tried", "overlay")
        made = (self("from", "scratch", check=False).split() or [""])[0]
        overlays = not self("mount", made, check=False).startswith("Error")
        self("rm", "--all", check=False)
        self._storage = self._in(folder / "root", "overlay" if overlays else "vfs")

    @staticmethod
    def _in(folder: Path, driver: str) -> tuple[str, ...]:
        return ("--root", str(folder), "--runroot", f"{folder}-run", "--storage-driver", driver)

    def __call__(self, command: str, *arguments: str, check: bool = True) -> str:
        done = subprocess.run(
            ["buildah", *self._storage, command, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=2000
        )
        assert not check or done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return done.stdout + ("" if check else done.stderr)

    @contextmanager
    def running(self, container: str, *command: str) -> Iterator[subprocess.Popen[bytes]]:
        """A command of a container while the block runs."""
        run = ["buildah", *self._storage, "run", "--isolation", "chroot", container, "--", *command]
        process = subprocess.Popen(run, start_new_session=True)
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


@pytest.fixture(scope="module")
def buildah(tmp_path_factory) -> Iterator[Buildah]:
    folder = tmp_path_factory.mktemp("buildah")
    buildah = Buildah(folder)
    yield buildah
    buildah("rm", "--all", check=False)  # takes mounts away
    shutil.rmtree(folder)  # gigabytes, which pytest would keep for three runs


@pytest.fixture(scope="module")
def base(buildah, tmp_path_factory) -> str:
    """A base image without a registry: the one that is named, or Debian by debootstrap."""
    named = os.environ.get("TRIMTAB_IMAGE_BASE")
    if named:
        return buildah("pull", named).strip()
    if shutil.which("debootstrap") is None:
        pytest.skip("no base image: apt-get install debootstrap, or TRIMTAB_IMAGE_BASE=…")
    root = tmp_path_factory.mktemp("debian") / "root"
    subprocess.run(
        ["debootstrap", "--variant=minbase", "bookworm", str(root), "http://deb.debian.org/debian"],
        check=True,
        capture_output=True,
        timeout=900,
    )
    if AUTHORITIES.is_dir():
        shutil.copytree(AUTHORITIES, root / AUTHORITIES.relative_to("/"), dirs_exist_ok=True)
    (root / "etc/pip.conf").write_text(f"[global]\ncert = /etc/ssl/certs/ca-certificates.crt\nfind-links = {WHEELS}\n")
    container = buildah("from", "scratch").strip()
    buildah("add", container, str(root), "/")
    buildah("commit", "--rm", container, "localhost/base:debian")
    shutil.rmtree(root)
    return "localhost/base:debian"


@pytest.fixture(scope="module", params=TARGETS)
def image(request, buildah, base) -> Iterator[tuple[str, str]]:
    """(target, a container made of its image)."""
    name = f"localhost/trimtab/{request.param}"
    options = shlex.split(os.environ.get("BUILDAH_ARGUMENTS", ""))
    options += [f"--volume={folder}:{folder}:ro" for folder in WHEELS.split() if Path(folder).is_dir()]
    fixed = ("--isolation", "chroot", "--layers", "--pull=never", "--format", "docker", "--build-arg", f"BASE={base}")
    buildah("bud", *fixed, *options, "--target", request.param, "-t", name, ".")
    container = buildah("from", "--pull-never", name).strip()
    yield request.param, container
    buildah("rm", container)


def inside(buildah: Buildah, container: str, *command: str, check: bool = True) -> str:
    return buildah("run", "--isolation", "chroot", container, "--", *command, check=check)


def test_trimtab_runs_in_it_as_a_user_who_is_not_root(buildah, image):
    _, container = image
    assert inside(buildah, container, "trimtab", "--version").startswith("trimtab ")
    assert inside(buildah, container, "id", "-u").strip() == "10001"
    assert "Permission denied" in inside(buildah, container, "touch", "/opt/trimtab/x", check=False)


def test_it_holds_no_compiler_and_no_installer(buildah, image):
    _, container = image
    script = "for tool in gcc cc g++ clang make pip pip3; do command -v $tool; done; true"
    assert inside(buildah, container, "sh", "-c", script) == ""


def test_its_service_is_there_and_refuses_with_a_line_where_something_is_missing(buildah, image):
    target, container = image
    command, refusal = {
        "web": (("label", "serve", "--host", "0.0.0.0"), "trimtab: "),
        "model-server": (
            ("serve", "reward", "--set", "model=/none"),
            "cannot serve reward: model: /none is not a model",
        ),
        "generator": (("serve", "generator", "--set", "model=/none"), "cannot serve generator: model: /none is not a"),
        "generator-vllm": (("serve", "generator", "--set", "model=/none"), "cannot serve generator: "),
        "trainer": (("rounds", "status", "/none"), "trimtab: "),
    }[target]
    said = inside(buildah, container, "trimtab", *command, check=False)
    assert "Traceback" not in said and refusal in said, said


def test_its_service_comes_up_and_the_health_check_answers(buildah, image):
    target, container = image
    if target in CANNOT_SERVE:
        pytest.skip(CANNOT_SERVE[target])
    port, health = free_ports(2)
    models = "/opt/trimtab/models/stories260K"
    command, check = {
        "web": (("label", "serve", "--port", str(port), "--database", "/tmp/x.sqlite"), f"127.0.0.1:{port}/healthz"),
        "model-server": (("serve", "reward", "--set", f"model={models}-reward"), f"127.0.0.1:{health}"),
        "generator": (("serve", "generator", "--set", f"model={models}-hf"), f"127.0.0.1:{health}"),
    }[target]
    if target != "web":
        command = (*command, "--set", f"port={port}", "--set", f"health_port={health}", "--set", "metrics_port=0")
    with buildah.running(container, "trimtab", *command) as service:
        deadline = time.monotonic() + 300
        while inside(buildah, container, "trimtab", "health", check, check=False):
            assert service.poll() is None and time.monotonic() < deadline
            time.sleep(1)


def test_every_package_of_it_is_listed_and_pinned(buildah, image):
    target, container = image
    parts = json.loads(inside(buildah, container, "cat", "/opt/trimtab/sbom.cdx.json"))["components"]
    file = ROOT / ("image/constraints-vllm.txt" if target == "generator-vllm" else "constraints.txt")
    pins = dict(line.split("==") for line in file.read_text().splitlines() if "==" in line)
    pinned = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    python = [part for part in parts if part["purl"].startswith("pkg:pypi/")]
    assert len(python) > 20 and any(part["purl"].startswith("pkg:deb/") for part in parts)
    for part in python:
        version = part["version"].partition("+")[0]
        assert pinned.get(part["name"].lower().replace("_", "-"), version) == version, part
    assert {part["name"].lower().replace("_", "-") for part in python} <= pinned.keys()
    assert not any(part["name"] == "gcc" for part in parts)


def test_its_labels_health_check_and_size(buildah, image):
    target, container = image
    about = json.loads(buildah("inspect", container))
    config = about["Docker"]["config"]
    assert config["User"] == "10001:10001" and config["Entrypoint"] == ["trimtab"]
    assert config["Labels"]["org.trimtab.sbom"] == "/opt/trimtab/sbom.cdx.json"
    assert config["Healthcheck"]["Test"][:1] == (["NONE"] if target == "trainer" else ["CMD"])
    listed = json.loads(buildah("images", "--json"))
    size = next(one["size"] for one in listed if f"localhost/trimtab/{target}:latest" in (one["names"] or []))
    number, unit = size.split()
    assert float(number) * {"KB": 1e3, "MB": 1e6, "GB": 1e9}[unit] < MOST_BYTES[target], size
