"""PPO's generators behind a name of DNS: replicas that come are told the newest version, those that go are let go."""

import asyncio
import socket

import grpc.aio
import pytest

from trimtab.trainer.ppo import generator_pool
from trimtab.trainer.ppo.generator_pool import GeneratorPool
from trimtab_client import ChannelOptions, ModelVersion, Unavailable
from trimtab_client.v1 import model_pb2, model_pb2_grpc

FIRST, NEWEST = ModelVersion("r", "policy", 0, "blake3:0"), ModelVersion("r", "policy", 1, "blake3:1")


class Replica(model_pb2_grpc.ModelServiceServicer):
    def __init__(self) -> None:
        self.version = FIRST.to_proto()
        self.refusal = ""

    async def GetModel(self, request, context):
        return model_pb2.GetModelResponse(model=model_pb2.ModelInfo(version=self.version))

    async def LoadVersion(self, request, context):
        if self.refusal:
            await context.abort(grpc.StatusCode.DATA_LOSS, self.refusal)
        self.version.CopyFrom(request.version)
        return model_pb2.LoadVersionResponse(model=model_pb2.ModelInfo(version=self.version))


@pytest.fixture
async def replicas(monkeypatch):
    """(start, name, behind): `await start("127.0.1.1")` serves there; `behind` lists what the name stands for."""
    behind, servers = [], []
    with socket.socket() as held:
        held.bind(("0.0.0.0", 0))
        port = held.getsockname()[1]

    async def start(number):
        server, replica = grpc.aio.server(options=[("grpc.so_reuseport", 0)]), Replica()
        model_pb2_grpc.add_ModelServiceServicer_to_server(replica, server)
        server.add_insecure_port(f"{number}:{port}")
        await server.start()
        servers.append(server)
        behind.append(number)
        return replica

    async def look_up(host, port, **_):
        if not behind:
            raise socket.gaierror("no address")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (number, port)) for number in behind]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", look_up)
    monkeypatch.setattr(generator_pool, "LOOK_EVERY_S", 0.05)
    yield start, f"dns:///generator.trimtab.svc:{port}", behind
    for server in servers:
        await server.stop(None)


def unheard(replica, reason):
    """Nobody listens."""


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 (servers of other tasks)
            await asyncio.sleep(0.02)


async def test_every_replica_behind_a_name_loads_the_newest_version_also_one_that_comes_later(replicas):
    start, name, behind = replicas
    first, second = await start("127.0.1.1"), await start("127.0.1.2")
    pool = GeneratorPool(name, ChannelOptions(retries=0), 10, unheard)
    pool.newest = NEWEST
    await pool.load()
    assert [each.version.step for each in (first, second)] == [1, 1]
    before = pool.client
    async with pool.kept_loaded():
        third = await start("127.0.1.3")
        await until(lambda: third.version.step == 1)
        assert pool.client is not before, "the calls that begin now go to the third too"
        behind.remove("127.0.1.1")
        first.version.step = 0
        await until(lambda: len(pool._replicas) == 2)
        assert (await pool.client.get_model()).version == NEWEST
    assert first.version.step == 0
    await pool.close()


async def test_a_name_without_replicas_is_unavailable_as_a_service_that_is_away(replicas):
    start, name, _ = replicas
    pool = GeneratorPool(name, ChannelOptions(retries=0), 10, unheard)
    pool.newest = NEWEST
    with pytest.raises(Unavailable, match=r"generator\.trimtab\.svc has no address"):
        await pool.load()
    async with pool.kept_loaded():
        replica = await start("127.0.1.1")
        await until(lambda: replica.version.step == 1)
    await pool.close()


async def test_addresses_are_taken_as_they_are(replicas):
    start, name, _ = replicas
    first, second, port = await start("127.0.1.1"), await start("127.0.1.2"), name.rpartition(":")[2]
    pool = GeneratorPool(f"127.0.1.1:{port},127.0.1.2:{port}", ChannelOptions(retries=0), 10, unheard)
    pool.newest, before = NEWEST, pool.client
    await pool.load()
    assert first.version.step == second.version.step == 1 and pool.client is before
    await pool.close()


async def test_a_replica_that_cannot_load_gets_no_calls_until_it_can_and_one_that_is_away_neither(replicas):
    start, name, _ = replicas
    good, broken, port = await start("127.0.1.1"), await start("127.0.1.2"), name.rpartition(":")[2]
    broken.refusal = "a checksum does not fit"
    said = {}
    addresses = [f"127.0.1.{number}:{port}" for number in (1, 2, 9)]
    pool = GeneratorPool(",".join(addresses), ChannelOptions(retries=0), 10, said.__setitem__)
    pool.newest = NEWEST
    await pool.load()
    assert good.version.step == 1 and pool._taking == {addresses[0]}
    assert said[f"replica {addresses[1]}"].endswith(f"cannot serve {NEWEST}: DATA_LOSS: a checksum does not fit")
    assert "UNAVAILABLE" in said[f"replica {addresses[2]}"]
    for _ in range(4):
        assert (await pool.client.get_model()).version == NEWEST
    async with pool.kept_loaded():
        broken.refusal = ""
        await until(lambda: said[f"replica {addresses[1]}"] == "")
    assert pool._taking == {addresses[0], addresses[1]}
    await pool.close()


async def test_the_only_replica_that_comes_back_and_cannot_load_says_why(replicas):
    start, name, _ = replicas
    replica, port = await start("127.0.1.1"), name.rpartition(":")[2]
    said = {}
    pool = GeneratorPool(f"127.0.1.1:{port}", ChannelOptions(retries=0), 10, said.__setitem__)
    pool.newest = NEWEST
    await pool.load()
    replica.version.CopyFrom(FIRST.to_proto())
    replica.refusal = "a checksum does not fit"
    async with pool.kept_loaded():
        await until(lambda: "a checksum does not fit" in said.get(f"replica 127.0.1.1:{port}", ""))
        replica.refusal = ""
        await until(lambda: not said[f"replica 127.0.1.1:{port}"])
    assert replica.version.step == 1
    await pool.close()
