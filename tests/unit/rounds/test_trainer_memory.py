"""The allocator that a trainer is started with."""

import os
import subprocess
import sys
from ctypes.util import find_library

import pytest

from trimtab.rounds.launchers import services

IN_MAPS = "print('libjemalloc' in open('/proc/self/maps').read())"


@pytest.fixture(autouse=True)
def nothing_preloaded(monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)


def test_jemalloc_is_taken_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(services, "find_library", {"jemalloc": "libjemalloc.so.2"}.get)
    environment = services.trainer_memory_environment()
    assert environment["LD_PRELOAD"] == "libjemalloc.so.2" and "MALLOC_ARENA_MAX" not in environment


def test_another_allocator_of_the_users_stays(monkeypatch):
    monkeypatch.setattr(services, "find_library", {"jemalloc": "libjemalloc.so.2"}.get)
    monkeypatch.setenv("LD_PRELOAD", "libtcmalloc.so.4")
    assert "LD_PRELOAD" not in services.trainer_memory_environment()


def test_elsewhere_malloc_keeps_what_it_has(monkeypatch):
    monkeypatch.setattr(services, "find_library", {}.get)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")
    assert services.trainer_memory_environment()["GLIBC_TUNABLES"] == "glibc.malloc.tcache_count=0"
    assert set(services.trainer_memory_environment()) == {
        "MALLOC_ARENA_MAX",
        "GLIBC_TUNABLES",
        "MALLOC_MMAP_THRESHOLD_",
        "MALLOC_TRIM_THRESHOLD_",
    }


@pytest.mark.skipif(find_library("jemalloc") is None, reason="jemalloc (Debian's libjemalloc2) is not installed")
def test_a_process_runs_on_it_without_complaints():
    environment = os.environ | services.trainer_memory_environment()
    run = subprocess.run([sys.executable, "-c", IN_MAPS], env=environment, capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("True\n", "")
