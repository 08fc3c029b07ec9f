"""The process that a reward model computes in: `python -m trimtab.reward.forward_process FD`.

Requests are read, checked and encoded by the server's interpreter; a forward of many small operations needs one too.
With one of its own neither waits for the other.

Over the socket FD come the objects of forward_messages.py, pickled: first an `Order`, answered with `ModelFacts`, then
`Work`, answered with float32 scores [B]; a `Failure` in place of either. It ends with the socket.
"""

from __future__ import annotations

import gc
import signal
import sys
from multiprocessing.connection import Connection

import numpy as np
import torch

from trimtab.models.errors import ModelLoadError
from trimtab.models.scalar_head import ScalarModel
from trimtab.reward.forward import ModelForward
from trimtab.reward.forward_messages import Failure, ModelFacts, Order, Work
from trimtab.runtime.logs import configure_logs, get_logger

log = get_logger(__name__)


def main() -> None:
    """Answer until the server's end of the socket is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they are the server's to answer, which may still have calls in flight
    with Connection(int(sys.argv[1])) as server:
        try:
            forward = _load(server)
            if forward is None:
                return
            while True:
                server.send(_answer(forward, server.recv()))
        except (EOFError, ConnectionError):
            return


def _load(server: Connection) -> ModelForward | None:
    order: Order = server.recv()
    configure_logs(order.log_level, order.log_format)
    if order.threads is not None:
        torch.set_num_threads(order.threads)
    try:
        model = ScalarModel.load(order.path_or_id, dtype=order.dtype, device=order.device)
        forward = ModelForward(model)
    except ModelLoadError as error:
        server.send(Failure(error.field, error.reason))
        return None
    gc.freeze()
    server.send(ModelFacts(**{name: getattr(model, name) for name in ModelFacts.__dataclass_fields__}))
    return forward


def _answer(forward: ModelForward, work: Work) -> np.ndarray | Failure:
    try:
        return forward.score(work.sequences, alone=work.alone)
    except Exception as error:
        log.error("a batch failed", sequences=len(work.sequences), exc_info=error)
        return Failure("", f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
