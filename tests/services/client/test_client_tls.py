"""TLS with certificates made here, and where a bearer token may travel."""

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from trimtab_client import AsyncRewardClient, ChannelOptions, RewardClient, Tls, Unavailable

QUICK = {"timeout_s": 5.0, "retries": 1}


@dataclass(frozen=True)
class Authority:
    """A certificate authority; `issue` writes NAME.pem and NAME.key."""

    folder: Path
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def issue(self, name: str, *names: x509.GeneralName) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _builder(name, self.certificate.subject, key)
        if names:
            certificate = certificate.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return self.write(name, certificate.sign(self.key, hashes.SHA256()), key)

    def write(self, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> tuple[Path, Path]:
        certificate_path, key_path = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        certificate_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        key_path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return certificate_path, key_path


def _builder(name: str, issuer: x509.Name | None, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer or subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(hours=1))
    )


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    basic = x509.BasicConstraints(ca=True, path_length=None)
    certificate = _builder("ca", None, key).add_extension(basic, critical=True).sign(key, hashes.SHA256())
    authority = Authority(tmp_path, key, certificate)
    authority.write("ca", certificate, key)
    return authority


def _server(authority: Authority, *names: x509.GeneralName, ask_client: bool = False) -> grpc.ServerCredentials:
    certificate, key = authority.issue("server", *(names or (x509.IPAddress(ipaddress.ip_address("127.0.0.1")),)))
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
    other = tmp_path / "other"
    other.mkdir()
    key = ec.generate_private_key(ec.SECP256R1())
    Authority(other, key, authority.certificate).write("ca", _builder("ca", None, key).sign(key, hashes.SHA256()), key)
    options = ChannelOptions(tls=Tls(ca=other / "ca.pem"), **QUICK)
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
