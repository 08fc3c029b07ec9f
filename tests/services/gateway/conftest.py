"""A gateway as its callers meet it: its own process's HTTP and gRPC ports, before real reward and generator servers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from trimtab.gateway.config import GatewayConfig
from trimtab.gateway.service import LABEL, SERVICES, load
from trimtab.generator import service as generator_service
from trimtab.generator.config import GeneratorConfig
from trimtab.reward import service as reward_service
from trimtab.reward.config import RewardConfig
from trimtab.runtime.server import RunningServer

TIMEOUT_S = 30.0
PORTS: dict[str, Any] = {"port": 0, "metrics_port": None}


@dataclass(frozen=True)
class Edge:
    """A running gateway. `http` speaks to it; `url` and `grpc` are its addresses."""

    http: httpx2.AsyncClient
    url: str
    grpc: str


@asynccontextmanager
async def gateway(**settings: Any) -> AsyncIterator[Edge]:
    """A gateway on ports of its own; `reward` and `generator` are addresses."""
    config = GatewayConfig(**PORTS | {"http_port": 0, "requests_per_s": None} | settings)
    async with RunningServer(LABEL, config, services=SERVICES, load=load) as server:
        url = f"http://127.0.0.1:{server.context.ports['http_port']}"
        async with httpx2.AsyncClient(base_url=url, timeout=TIMEOUT_S) as http:
            yield Edge(http, url, server.address)


@pytest.fixture(scope="module")
def reward_folder(make_tiny) -> Path:
    return make_tiny("reward", seed=1)


@pytest.fixture(scope="module")
def policy_folder(make_tiny) -> Path:
    return make_tiny("policy", seed=2)


Opens = Callable[..., AbstractAsyncContextManager[Edge]]


@pytest.fixture(scope="module")
async def upstreams(reward_folder, policy_folder) -> AsyncIterator[dict[str, str]]:
    """Addresses of a real reward server and a real generator, for `gateway`."""
    reward = RewardConfig(**PORTS, threads=1, model=str(reward_folder))
    generator = GeneratorConfig(**PORTS, threads=1, model=str(policy_folder))
    async with (
        RunningServer("reward", reward, services=reward_service.SERVICES, load=reward_service.load) as scorer,
        RunningServer(
            "generator", generator, services=generator_service.SERVICES, load=generator_service.load
        ) as sampler,
    ):
        yield {"reward": scorer.address, "generator": sampler.address}


@pytest.fixture(scope="module")
async def edge(upstreams) -> AsyncIterator[Edge]:
    """A gateway before both, open to all."""
    async with gateway(**upstreams) as opened:
        yield opened
