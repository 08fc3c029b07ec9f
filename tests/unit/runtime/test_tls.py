"""What an HTTP server listens with: the certificate, key and authorities that are in the files at each connection."""

import shutil
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services.authority import LOOPBACK, Authority
from trimtab.runtime.auth_config import AuthConfig
from trimtab.runtime.config import ServiceConfig
from trimtab.runtime.errors import StartError
from trimtab.runtime.tls import http_context

TIMEOUT_S = 10


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.make(tmp_path / "authority")


class Files:
    """A server's certificate and key, and the config that names them."""

    def __init__(self, folder: Path) -> None:
        self.cert, self.key, self.clients = folder / "tls.crt", folder / "tls.key", folder / "clients.crt"

    def hold(self, pair: tuple[Path, Path]) -> None:
        shutil.copy(pair[0], self.cert)
        shutil.copy(pair[1], self.key)

    def config(self) -> ServiceConfig:
        tls = {"tls_cert": self.cert, "tls_key": self.key}
        if not self.clients.exists():
            return ServiceConfig(metrics_port=None, **tls)
        auth = AuthConfig(certificates={"*": ("score",)})
        return ServiceConfig(metrics_port=None, auth=auth, tls_client_ca=self.clients, **tls)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


class Greeter:
    """Greets each caller by TLS with a context, and says one byte."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self._bound = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._greet, daemon=True).start()

    def shown(self, authority: Authority, own: tuple[Path, Path] | None = None) -> str | None:
        """The certificate that a new connection sees, as PEM; None where the server refuses it."""
        context = ssl.create_default_context(cafile=str(authority.ca))
        if own is not None:
            context.load_cert_chain(*own)
        try:
            with (
                socket.create_connection(self._bound.getsockname(), timeout=TIMEOUT_S) as bare,
                context.wrap_socket(bare, server_hostname="127.0.0.1") as secured,
            ):
                if secured.recv(1) != b"!":  # with TLS 1.3 a client learns only now that it was refused
                    return None
                return ssl.DER_cert_to_PEM_cert(secured.getpeercert(binary_form=True) or b"")
        except (ssl.SSLError, ConnectionError):
            return None

    def close(self) -> None:
        self._bound.close()

    def _greet(self) -> None:
        while self._bound.fileno() != -1:
            try:
                caller, _ = self._bound.accept()
                with self._context.wrap_socket(caller, server_side=True) as secured:
                    secured.sendall(b"!")
            except OSError:
                continue


@pytest.fixture
def greeting(request) -> Iterator[list[Greeter]]:
    opened: list[Greeter] = []
    yield opened
    for greeter in opened:
        greeter.close()


def greeter(files: Files, greeting: list[Greeter]) -> Greeter:
    context = http_context(files.config())
    assert context is not None
    greeting.append(Greeter(context))
    return greeting[-1]


def test_each_connection_gets_the_certificate_of_the_moment(authority, files, greeting):
    first, second = authority.issue("first", LOOPBACK), authority.issue("second", LOOPBACK)
    files.hold(first)
    server = greeter(files, greeting)
    assert server.shown(authority) == first[0].read_text()
    shutil.copy(second[1], files.key)  # half of a renewal
    assert server.shown(authority) == first[0].read_text()
    shutil.copy(second[0], files.cert)
    assert [server.shown(authority) for _ in range(2)] == [second[0].read_text()] * 2
    files.cert.write_text("rubbish")
    assert server.shown(authority) == second[0].read_text()


def test_clients_of_a_replaced_authority_are_refused_from_then_on(authority, files, greeting, tmp_path):
    server_own = authority.issue("server", LOOPBACK)
    files.hold(server_own)
    shutil.copy(authority.ca, files.clients)
    server = greeter(files, greeting)
    other = Authority.make(tmp_path / "other")
    old, new = authority.issue("old", LOOPBACK), other.issue("new", LOOPBACK)
    shown = server_own[0].read_text()
    assert [server.shown(authority, own) for own in (None, old, new)] == [None, shown, None]
    shutil.copy(other.ca, files.clients)
    assert [server.shown(authority, own) for own in (None, old, new)] == [None, None, shown]


def test_unusable_files_are_named_at_the_start(authority, files):
    (cert, _), (_, key) = authority.issue("a", LOOPBACK), authority.issue("b", LOOPBACK)
    files.hold((cert, key))
    with pytest.raises(StartError, match=r"^tls_cert: .*tls\.crt and .*tls\.key are no usable pair"):
        http_context(files.config())
    files.hold(authority.issue("c", LOOPBACK))
    files.clients.write_text("-----BEGIN CERTIFICATE-----\nrubbish\n-----END CERTIFICATE-----\n")
    with pytest.raises(StartError, match=r"^tls_client_ca: cannot use .*clients\.crt"):
        http_context(files.config())
    files.clients.write_text("rubbish")
    with pytest.raises(StartError, match=r"^tls_client_ca: .*clients\.crt is not a PEM file"):
        http_context(files.config())


def test_without_tls_there_is_no_context():
    assert http_context(ServiceConfig(metrics_port=None)) is None
