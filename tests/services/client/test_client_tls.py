"""TLS with certificates made here, and where a bearer token may travel."""

from pathlib import Path

import grpc
import pytest
from cryptography import x509

from tests.services.authority import LOOPBACK, Authority
from trimtab_client import AsyncRewardClient, ChannelOptions, RewardClient, Tls, Unavailable

QUICK = {"timeout_s": 5.0, "retries": 1}


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.make(tmp_path)


def _server(authority: Authority, *names: x509.GeneralName, ask_client: bool = False) -> grpc.ServerCredentials:
    certificate, key = authority.issue("server", *(names or (LOOPBACK,)))
    ca = (authority.folder / "ca.pem").read_bytes()
    pair = (key.read_bytes(), certificate.read_bytes())
    return grpc.ssl_server_credentials([pair], ca if ask_client else None, ask_client)


async def test_a_token_travels_over_tls(rooms, sdk, authority):
    room = await rooms(credentials=_server(authority))
    options = ChannelOptions(tls=Tls(ca=authority.folder / "ca.pem"), token="s3cret", timeout_s=10)
    assert (await sdk.call("Reward", room.address, "get_model", options=options)).vocab_size == 100
    await sdk.call("Generator", room.address, "generate", ["a"], options=options)
    assert room.metadata and all(metadata["authorization"] == "Bearer s3cret" for metadata in room.metadata)


async def test_a_server_of_another_authority_is_not_trusted(rooms, sdk, authority, tmp_path):
    room = await rooms(credentials=_server(authority))
    other = Authority.make(tmp_path / "other")
    options = ChannelOptions(tls=Tls(ca=other.ca), **QUICK)
    with pytest.raises(Unavailable):
        await sdk.call("Reward", room.address, "get_model", options=options)
    assert not room.calls["GetModel"]


async def test_a_server_is_known_by_its_certificates_name(rooms, sdk, authority):
    room = await rooms(credentials=_server(authority, x509.DNSName("reward.example")))
    ca = authority.folder / "ca.pem"
    with pytest.raises(Unavailable):
        await sdk.call("Reward", room.address, "get_model", options=ChannelOptions(tls=Tls(ca=ca), **QUICK))
    named = ChannelOptions(tls=Tls(ca=ca, server_name="reward.example"), timeout_s=10)
    assert (await sdk.call("Reward", room.address, "get_model", options=named)).vocab_size == 100


async def test_a_client_shows_its_certificate_where_the_server_asks(rooms, sdk, authority):
    room = await rooms(credentials=_server(authority, ask_client=True))
    certificate, key = authority.issue("trainer")
    ca = authority.folder / "ca.pem"
    options = ChannelOptions(tls=Tls(ca=ca, cert=certificate, key=key), timeout_s=10)
    assert (await sdk.call("Reward", room.address, "get_model", options=options)).vocab_size == 100
    with pytest.raises(Unavailable):
        await sdk.call("Reward", room.address, "get_model", options=ChannelOptions(tls=Tls(ca=ca), **QUICK))


async def test_plaintext_does_not_reach_a_tls_server(rooms, sdk, authority):
    room = await rooms(credentials=_server(authority))
    with pytest.raises(Unavailable):
        await sdk.call("Reward", room.address, "get_model", options=ChannelOptions(**QUICK))


async def test_a_token_without_tls_travels_on_this_machine_only(rooms, sdk):
    room = await rooms()
    await sdk.call("Reward", room.address, "get_model", options=ChannelOptions(token="s3cret"))
    assert room.metadata[0]["authorization"] == "Bearer s3cret"
    for client in (RewardClient, AsyncRewardClient):
        with pytest.raises(ValueError, match="TLS"):
            client(["127.0.0.1:1", "reward.example:7102"], ChannelOptions(token="s3cret"))


async def test_no_token_no_header(rooms, sdk):
    room = await rooms()
    await sdk.call("Reward", room.address, "get_model")
    assert "authorization" not in room.metadata[0]
