"""Certificates and tokens are renewed on both sides while server and client go on."""

import asyncio
import shutil
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from tests.services.authority import LOOPBACK, Authority
from tests.services.client.conftest import Room
from trimtab.runtime.auth_config import AuthConfig
from trimtab.runtime.config import ServiceConfig
from trimtab.runtime.keys import add_key, revoke_key
from trimtab.runtime.server import RunningServer, ServerContext, Service
from trimtab_client import (
    AsyncGeneratorClient,
    AsyncRewardClient,
    ChannelOptions,
    GeneratorClient,
    PermissionDenied,
    RewardClient,
    Sampling,
    Tls,
    Unauthenticated,
)
from trimtab_client.credentials import LOOK_EVERY_S
from trimtab_client.v1 import generator_pb2_grpc, model_pb2_grpc, reward_pb2_grpc

NAMES = ("trimtab.v1.ModelService", "trimtab.v1.RewardService", "trimtab.v1.GeneratorService")
ADDERS = (
    model_pb2_grpc.add_ModelServiceServicer_to_server,
    reward_pb2_grpc.add_RewardServiceServicer_to_server,
    generator_pb2_grpc.add_GeneratorServiceServicer_to_server,
)
SOON_S = LOOK_EVERY_S + 0.2
Ask = Callable[[], Awaitable[Any]]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.make(tmp_path / "authority")


def server(room: Room, **settings: Any) -> RunningServer:
    async def load(context: ServerContext) -> list[Service]:
        return [Service(name, add, room) for name, add in zip(NAMES, ADDERS, strict=True)]

    return RunningServer("room", ServiceConfig(metrics_port=None, **settings), services=list(NAMES), load=load)


def install(pair: tuple[Path, Path], cert: Path, key: Path) -> None:
    """Put a new certificate and key in the place of the old ones, as a renewal does."""
    for source, target in zip(pair, (cert, key), strict=True):
        shutil.copy(source, target.with_suffix(".new"))
        target.with_suffix(".new").replace(target)


@pytest.fixture(params=["sync", "asyncio"])
async def ask(request, authority, tmp_path) -> AsyncIterator[Callable[[str, ChannelOptions], Ask]]:
    """ask(address, options)() scores a text, each time with the same client."""
    clients: list[Any] = []

    def ask(address: str, options: ChannelOptions) -> Ask:
        if request.param == "sync":
            client = RewardClient(address, options)
            clients.append(client)
            return lambda: asyncio.to_thread(client.score_texts, [("a", "b")])
        client = AsyncRewardClient(address, options)
        clients.append(client)
        return lambda: client.score_texts([("a", "b")])

    yield ask
    for client in clients:
        if isinstance(client, RewardClient):
            client.close()
        else:
            await client.close()


async def served_certificate(address: str) -> str:
    host, port = address.split(":")
    return await asyncio.to_thread(ssl.get_server_certificate, (host, int(port)))


async def test_a_server_shows_its_renewed_certificate_from_the_next_connection_on(authority, tmp_path):
    cert, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    first, second = authority.issue("first", LOOPBACK), authority.issue("second", LOOPBACK)
    install(first, cert, key)
    async with server(Room(), tls_cert=cert, tls_key=key) as running:
        assert await served_certificate(running.address) == first[0].read_text()
        shutil.copy(second[1], key)  # half of a renewal
        assert await served_certificate(running.address) == first[0].read_text()
        shutil.copy(second[0], cert)
        assert await served_certificate(running.address) == second[0].read_text()
        cert.write_text("rubbish")
        assert await served_certificate(running.address) == second[0].read_text()


async def test_a_server_takes_clients_of_renewed_authorities(authority, tmp_path, ask):
    cert, key = authority.issue("server", LOOPBACK)
    name = x509.DNSName("caller.example")
    other = Authority.make(tmp_path / "other")
    trusted = tmp_path / "clients.pem"
    shutil.copy(authority.ca, trusted)
    roles = AuthConfig(certificates={"caller.example": ("score",)})
    async with server(Room(), tls_cert=cert, tls_key=key, tls_client_ca=trusted, auth=roles) as running:
        old, new = (
            ChannelOptions(tls=Tls(authority.ca, *issuer.issue("caller", name)), timeout_s=5, retries=0)
            for issuer in (authority, other)
        )
        await ask(running.address, old)()
        with pytest.raises(Exception, match="UNAVAILABLE"):
            await ask(running.address, new)()
        shutil.copy(other.ca, trusted)
        await ask(running.address, new)()
        with pytest.raises(Exception, match="UNAVAILABLE"):
            await ask(running.address, old)()


async def test_a_client_shows_its_renewed_certificate_without_a_restart(authority, tmp_path, ask):
    cert, key = authority.issue("server", LOOPBACK)
    own_cert, own_key = tmp_path / "own.crt", tmp_path / "own.key"
    install(authority.issue("plain", x509.DNSName("plain.example")), own_cert, own_key)
    scoring = authority.issue("scoring", x509.DNSName("scoring.example"))
    roles = AuthConfig(certificates={"plain.example": ("label",), "scoring.example": ("score",)})
    async with server(Room(), tls_cert=cert, tls_key=key, tls_client_ca=authority.ca, auth=roles) as running:
        score = ask(running.address, ChannelOptions(tls=Tls(authority.ca, own_cert, own_key), timeout_s=10))
        with pytest.raises(PermissionDenied, match=r"plain\.example lacks the role 'score'"):
            await score()
        shutil.copy(scoring[1], own_key)  # half of a renewal: the old pair goes on
        await asyncio.sleep(SOON_S)
        with pytest.raises(PermissionDenied):
            await score()
        shutil.copy(scoring[0], own_cert)
        await asyncio.sleep(SOON_S)
        assert (await score()).scores.tolist() == [1.0]


@pytest.mark.parametrize("style", ["sync", "asyncio"])
async def test_a_renewal_interrupts_no_stream(authority, tmp_path, style):
    cert, key = authority.issue("server", LOOPBACK)
    own_cert, own_key = tmp_path / "own.crt", tmp_path / "own.key"
    install(authority.issue("a", x509.DNSName("a.example")), own_cert, own_key)
    room = Room()
    room.pause_between_s = 0.5
    roles = AuthConfig(certificates={"*.example": ("generate",)})
    async with server(room, tls_cert=cert, tls_key=key, tls_client_ca=authority.ca, auth=roles) as running:
        options = ChannelOptions(tls=Tls(authority.ca, own_cert, own_key), timeout_s=20)

        def both(client: GeneratorClient) -> int:
            """A stream during which the certificate is renewed and another call is made."""
            completions = client.generate(["a"], Sampling(n=6))
            next(completions)
            install(authority.issue("b", x509.DNSName("b.example")), own_cert, own_key)
            next(completions), next(completions), next(completions)
            client.get_model()
            return len(list(completions)) + 4

        async def both_async(client: AsyncGeneratorClient) -> int:
            completions, count = client.generate(["a"], Sampling(n=6)), 0
            async for _ in completions:
                count += 1
                if count == 1:
                    install(authority.issue("b", x509.DNSName("b.example")), own_cert, own_key)
                if count == 4:
                    await client.get_model()
            return count

        if style == "sync":
            with GeneratorClient(running.address, options) as client:
                assert await asyncio.to_thread(both, client) == 6
        else:
            async with AsyncGeneratorClient(running.address, options) as client:
                assert await both_async(client) == 6
    assert len(room.calls["Generate"]) == 1
    assert room.peers["Generate"] == ["a.example"]
    assert room.peers["GetModel"][-1] == "b.example"


async def test_a_token_is_read_again_when_its_file_changes(authority, tmp_path, ask):
    cert, key = authority.issue("server", LOOPBACK)
    keys_file, token_file = tmp_path / "keys.yaml", tmp_path / "token"
    token_file.write_text(add_key(keys_file, "old", ["score"])[1])
    async with server(Room(), tls_cert=cert, tls_key=key, auth=AuthConfig(keys_file=keys_file)) as running:
        score = ask(running.address, ChannelOptions(tls=Tls(authority.ca), token_file=token_file, timeout_s=10))
        await score()
        token = add_key(keys_file, "new", ["score"])[1]
        revoke_key(keys_file, "old")
        with pytest.raises(Unauthenticated, match="not known"):
            await score()
        token_file.write_text(token)
        await asyncio.sleep(SOON_S)
        await score()
