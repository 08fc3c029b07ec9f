"""A gRPC server of a few lines for tests of the supervisor: `small_service.py PORT MODE [PID_FILE]`.

MODE: "serve" serves health, "fail" logs a reason and exits 3, "stubborn" serves and ignores SIGTERM,
"family" serves and first starts a child of its own, whose pid it writes beside its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc


def main() -> int:
    port, mode = sys.argv[1], sys.argv[2]
    pids = [os.getpid()]
    if mode == "fail":
        print("loading", flush=True)
        print("\x1b[31mmodel folder /nowhere does not exist\x1b[0m\n", flush=True)
        return 3
    if mode == "family":
        pids.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid)
    if len(sys.argv) > 3:
        Path(sys.argv[3]).write_text(" ".join(map(str, pids)))
    stop = threading.Event()
    signal.signal(signal.SIGTERM, (lambda *_: None) if mode == "stubborn" else (lambda *_: stop.set()))
    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
    servicer = health.HealthServicer()
    servicer.set("small", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    print("serving", flush=True)
    stop.wait()
    server.stop(None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
