"""The ranks of one trainer: one process, or several under torchrun that hold a model in shards (FSDP2) and step as one.

Every rank runs the same stage in the same order. Rank 0 alone talks to the world: it reads the folder of the run, asks
the services, writes metrics and publishes, and tells the others what they need (`told`). A batch is shared by tokens,
losses are divided by what the whole batch counts, and gradients are summed, so all of them together take the step that
one rank would take. With one rank every method here does nothing, and torch.distributed is never imported.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch

from trimtab.models.sharded import shard

T = TypeVar("T")

PR_SET_PDEATHSIG = 1
MEETING = timedelta(seconds=60)
PATIENCE = timedelta(days=30)
"""How long ranks wait for rank 0's next word. One that dies ends the others at once: torchrun sees to it."""


class RanksApartError(Exception):
    """A rank is gone or waits for another thing than the others; only a new start brings them together."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one model.

    Attributes:
        words: the process group of what is no tensor of the model; None for one rank.
    """

    rank: int = 0
    world: int = 1
    device: str = "cpu"
    words: Any = None

    @classmethod
    def join(cls, device: str) -> Ranks:
        """The ranks that torchrun started together with this process; one rank where it did not."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1 or "RANK" not in os.environ:
            return cls(device=device)
        import torch.distributed as dist

        if device != "cpu":
            device = f"{device.split(':')[0]}:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        store, rank, _ = next(dist.rendezvous("env://"))  # pyright: ignore[reportPrivateImportUsage]: documented
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives the dead
        store = dist.PrefixStore(f"start-{start}", store)  # pyright: ignore[reportPrivateImportUsage]: documented
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        words = dist.new_group(backend="gloo", timeout=PATIENCE)
        return cls(rank, world, device, words)

    def leave(self) -> None:
        """Part from the others."""
        if self.world > 1:
            import torch.distributed as dist

            dist.destroy_process_group()

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def told(self, work: Callable[[], T]) -> T:
        """What rank 0's `work` gives, on every rank; where it raises, every rank raises that. Others do not call it."""
        if self.world == 1:
            return work()
        import torch.distributed as dist

        word: list[Any] = [None, None]
        if self.leads:
            try:
                word[0] = work()
            except Exception as error:
                word[1] = _portable(error)
                dist.broadcast_object_list(word, src=0, group=self.words)
                raise
        dist.broadcast_object_list(word, src=0, group=self.words)
        if word[1] is not None:
            raise word[1]
        return word[0]

    def lead(self, work: Callable[[], T]) -> T:
        """`work` on rank 0 alone, which keeps its result; only `told` may use that. Where it raises, all ranks do."""
        own: list[T] = []
        self.told(lambda: own.append(work()))
        return own[0] if self.leads else cast(T, None)

    def in_turn(self, work: Callable[[], T]) -> T:
        """Each rank's own result of `work`: rank 0 does it first, and where it fails every rank raises that."""
        own: list[T] = []
        self.told(lambda: own.append(work()))
        return own[0] if self.leads else work()

    def meet(self) -> None:
        """Wait until every rank is here. Raises RanksApartError where one is not within `MEETING`: it went astray."""
        if self.world == 1:
            return
        import torch.distributed as dist

        try:
            dist.monitored_barrier(self.words, timeout=MEETING)
        except RuntimeError as error:
            raise RanksApartError(f"the ranks are not together any more ({error}); start them again") from error

    def mesh(self, device: str) -> Any:
        """The ranks as a device mesh of a kind of device."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(device.split(":")[0], (self.world,))

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's shard of a tensor, by rows as FSDP2 cuts it; a number stays whole."""
        if self.world == 1 or not whole.dim():
            return whole
        parts = whole.chunk(self.world)
        return parts[self.rank].clone() if self.rank < len(parts) else whole[:0].clone()

    def add(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Each number summed over the ranks, in float64."""
        if self.world == 1:
            return dict(sums)
        import torch.distributed as dist

        numbers = torch.tensor(list(sums.values()), dtype=torch.float64)
        dist.all_reduce(numbers, group=self.words)
        return dict(zip(sums, numbers.tolist(), strict=True))

    def total(self, number: float) -> float:
        """The ranks' numbers added up."""
        return self.add({"number": number})["number"]

    def largest(self, value: float) -> float:
        """The largest of the ranks' numbers."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        number = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self.words)
        return float(number)

    def join_parts(self, *parts: torch.Tensor) -> None:
        """Make host tensors whole of which every rank filled some elements and left 0 in the others, in place."""
        if self.world > 1:
            import torch.distributed as dist

            for part in parts:
                dist.all_reduce(part, group=self.words)

    def norm(self, norm: torch.Tensor) -> torch.Tensor:
        """The norm of all shards together, given that of this rank's."""
        if self.world == 1:
            return norm
        square = self.add({"square": float(norm) ** 2})["square"]
        return torch.tensor(square, dtype=torch.float64).sqrt().to(norm.device, norm.dtype)

    def plan(
        self, sizes: Sequence[int], max_tokens: int, cut: Callable[[Sequence[int], int], list[list[int]]]
    ) -> list[list[int]]:
        """This rank's micro-batches of what all ranks do together: indices of `sizes`, which are tokens.

        `cut` makes micro-batches of sizes. Each rank gets equally many, as all take part in gathering each layer: one
        that has done its share is idle in the rest ([]).
        """
        if self.world == 1:
            return cut(sizes, max_tokens)
        plans = []
        for share in share_out(sizes, self.world):
            micro_batches = cut([sizes[i] for i in share], max_tokens)
            plans.append([[share[i] for i in micro] for micro in micro_batches])
        mine = plans[self.rank]
        return mine + [[] for _ in range(max(map(len, plans)) - len(mine))]

    def shard(self, model: torch.nn.Module, compute_dtype: str) -> None:
        """Leave this rank its shard of each parameter (FSDP2); the optimizer's masters are those shards.

        With one rank the model stays as it is.
        """
        if self.world > 1:
            dtype = torch.bfloat16 if compute_dtype == "bfloat16" else next(model.parameters()).dtype
            shard(model, self.mesh(self.device), dtype)


ALONE = Ranks()


def follows() -> bool:
    """Whether torchrun started this process as another rank than 0."""
    return "WORLD_SIZE" in os.environ and os.environ.get("RANK", "0") != "0"


def end_with_launcher() -> None:
    """Tie a rank's life to torchrun's, which starts ranks in sessions of their own: killed, it would leave them behind.

    Call it on the main thread: the tie is the thread's. Elsewhere than on Linux it does nothing. SystemExit where
    torchrun was started by `trimtab job` and is gone already.
    """
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    tethered = os.environ.get("TETHERED_PID")  # torchrun's, or this process's own
    if tethered is not None and int(tethered) not in (os.getppid(), os.getpid()):
        raise SystemExit(1)


def share_out(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices for each rank, sums of sizes as even as the largest-first rule makes them; each share ascending."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = min(range(ranks), key=loads.__getitem__)
        shares[least].append(index)
        loads[least] += sizes[index]
    return [sorted(share) for share in shares]


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same, if it cannot travel."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
