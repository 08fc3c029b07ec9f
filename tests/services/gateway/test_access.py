"""Every HTTP route is refused without the right credentials, before its body is read, and open with them."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from cryptography import x509

from tests.services.authority import LOOPBACK, Authority
from tests.services.gateway.conftest import PORTS, TIMEOUT_S
from tests.services.token_issuer import TokenIssuer
from trimtab.gateway.access import NO_CREDENTIALS, ROLES, WAY_IN, Gate
from trimtab.gateway.app import create_app
from trimtab.gateway.config import GatewayConfig
from trimtab.gateway.room import Room
from trimtab.gateway.service import LABEL, SERVICES, load
from trimtab.gateway.upstreams import Upstreams
from trimtab.runtime.auth import Authenticator
from trimtab.runtime.auth_config import AuthConfig
from trimtab.runtime.keys import add_key
from trimtab.runtime.metrics import Metrics
from trimtab.runtime.roles import ANY
from trimtab.runtime.roles import ROLES as EVERY_ROLE
from trimtab.runtime.server import RunningServer

ALL = tuple(sorted(EVERY_ROLE))
ISSUER = "https://issuer.example"
OPEN, UNKNOWN_CALLER, DENIED = "open", 401, 403
# A path that does not exist asks for credentials all the same.
ROUTES = {**ROLES, "/v1/elsewhere": ANY, "/": ANY}
GET = {"/v1/models", "/v1/models/{name}", "/openapi.json", "/v1/elsewhere", "/"}


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def issuer() -> TokenIssuer:
    return TokenIssuer(ISSUER)


@pytest.fixture
def keys_file(tmp_path) -> Path:
    return tmp_path / "keys.yaml"


class Secured:
    """A gateway with TLS, and its routes asked with some credentials."""

    def __init__(self, authority: Authority, port: int) -> None:
        self._authority = authority
        self.url = f"https://127.0.0.1:{port}"

    def open(self, own: tuple[Path, Path] | None = None) -> httpx2.AsyncClient:
        context = ssl.create_default_context(cafile=str(self._authority.ca))
        if own is not None:
            context.load_cert_chain(*own)
        return httpx2.AsyncClient(base_url=self.url, verify=context, timeout=TIMEOUT_S)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        context = ssl.create_default_context(cafile=str(self._authority.ca))
        host, port = self.url.removeprefix("https://").split(":")
        return await asyncio.open_connection(host, int(port), ssl=context)

    async def outcomes(self, token: str | None, own: tuple[Path, Path] | None = None) -> dict[str, object]:
        """Of each route: 401, 403, or open (an empty body is refused for what it is)."""
        headers = {"authorization": f"Bearer {token}"} if token is not None else {}
        async with self.open(own) as http:
            found: dict[str, object] = {}
            for route in ROUTES:
                method = "GET" if route in GET else "POST"
                answer = await http.request(method, route.replace("{name}", "reward"), headers=headers)
                refused = answer.status_code in (401, 403)
                assert not refused or answer.json()["error"]["message"]
                assert answer.status_code != 401 or answer.headers["www-authenticate"] == "Bearer"
                found[route] = answer.status_code if refused else OPEN
        return found


@asynccontextmanager
async def secured(authority: Authority, auth: AuthConfig, **settings: Any) -> AsyncIterator[Secured]:
    cert, key = authority.issue("server", LOOPBACK)
    config = GatewayConfig(
        **PORTS, http_port=0, reward="127.0.0.1:1", timeout_s=1, tls_cert=cert, tls_key=key, auth=auth, **settings
    )
    async with RunningServer(LABEL, config, services=SERVICES, load=load) as server:
        yield Secured(authority, server.context.ports["http_port"])


@pytest.fixture
async def by_token(authority, issuer, keys_file, tmp_path) -> AsyncIterator[Secured]:
    add_key(keys_file, "somebody", ["label"])
    jwt = {
        "issuer": ISSUER,
        "audience": "trimtab",
        "jwks": str(issuer.write(tmp_path / "jwks.json")),
        "subjects": {"all": ALL},
        "leeway_s": 0,
    }
    async with secured(authority, AuthConfig.model_validate({"keys_file": keys_file, "jwt": [jwt]})) as opened:
        yield opened


def everywhere(outcome: object) -> dict[str, object]:
    return dict.fromkeys(ROUTES, outcome)


async def test_no_wrong_or_expired_credentials_open_nothing(by_token, issuer, keys_file):
    assert await by_token.outcomes(None) == everywhere(UNKNOWN_CALLER)
    key, token = add_key(keys_file, "right", ALL)
    _, past = add_key(keys_file, "past", ALL, expires=datetime.now(UTC) - timedelta(seconds=1))
    wrong = {
        "nonsense": "x",
        "another secret": f"tt_{key.id}_{'A' * 43}",
        "an expired key": past,
        "an expired token": issuer.token("all", ends_in_s=-1),
        "for another audience": issuer.token("all", aud="other"),
        "signed by another": TokenIssuer(ISSUER).token("all"),
    }
    for what, given in wrong.items():
        assert await by_token.outcomes(given) == everywhere(UNKNOWN_CALLER), what
    assert await by_token.outcomes(token) == everywhere(OPEN)
    assert await by_token.outcomes(issuer.token("all")) == everywhere(OPEN)


@pytest.mark.parametrize("role", ALL)
async def test_a_role_opens_its_own_routes_and_no_others(by_token, keys_file, role):
    _, only = add_key(keys_file, f"only-{role}", [role])
    assert await by_token.outcomes(only) == {r: OPEN if needs in (role, ANY) else DENIED for r, needs in ROUTES.items()}
    _, but = add_key(keys_file, f"but-{role}", [other for other in ALL if other != role])
    assert await by_token.outcomes(but) == {r: DENIED if needs == role else OPEN for r, needs in ROUTES.items()}


async def test_credentials_are_looked_at_before_the_body(by_token):
    reader, writer = await by_token.connect()
    writer.write(b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
    assert (await asyncio.wait_for(reader.readline(), 10)).split()[1] == b"401"
    writer.close()


async def test_probes_need_no_credentials_and_learn_nothing(by_token):
    async with by_token.open() as http:
        assert [(await http.get(route)).json() for route in NO_CREDENTIALS] == [{"status": "serving"}]


async def test_a_certificate_s_names_have_roles(authority, tmp_path):
    auth = AuthConfig.model_validate({"certificates": {"only-score.example": ["score"], "spiffe://c/all": list(ALL)}})
    async with secured(authority, auth, tls_client_ca=authority.ca) as opened:
        everything = authority.issue("all", x509.UniformResourceIdentifier("spiffe://c/all"))
        assert await opened.outcomes(None, everything) == everywhere(OPEN)
        score = authority.issue("only", x509.DNSName("only-score.example"))
        assert await opened.outcomes(None, score) == {
            route: OPEN if needs in ("score", ANY) else DENIED for route, needs in ROUTES.items()
        }
        stranger = authority.issue("stranger", x509.DNSName("stranger.example"))
        assert await opened.outcomes(None, stranger) == everywhere(UNKNOWN_CALLER)
        foreign = Authority.make(tmp_path / "other").issue("foreign", x509.DNSName("only-score.example"))
        for own in (None, foreign, authority.issue("late", x509.DNSName("only-score.example"), ended=True)):
            with pytest.raises(httpx2.TransportError):
                await opened.outcomes(None, own)


async def test_callers_are_limited_one_by_one(authority, keys_file):
    tokens = [add_key(keys_file, name, ["score"])[1] for name in ("a", "b")]
    few = {"requests_per_s": 0.1, "burst": 2}
    async with secured(authority, AuthConfig(keys_file=keys_file), **few) as opened, opened.open() as http:

        async def asked(token: str) -> int:
            return (await http.get("/v1/models", headers={"authorization": f"Bearer {token}"})).status_code

        assert [await asked(tokens[0]) for _ in range(3)] == [200, 200, 429]
        assert await asked(tokens[1]) == 200


async def test_a_renewed_certificate_is_shown_without_a_restart(authority, keys_file):
    add_key(keys_file, "a", ["score"])
    async with secured(authority, AuthConfig(keys_file=keys_file)) as opened:

        async def serial() -> str:
            _, writer = await opened.connect()
            shown = writer.get_extra_info("peercert")["serialNumber"]
            writer.close()
            return shown

        before = await serial()
        assert await serial() == before
        authority.issue("server", LOOPBACK)
        assert await serial() != before


def test_the_table_of_roles_uses_roles_that_exist():
    assert set(ROLES.values()) <= EVERY_ROLE | {ANY}


async def test_the_table_knows_every_route_of_the_application_and_no_other_exists():
    config = GatewayConfig(reward="127.0.0.1:1")
    gate = Gate(config, Authenticator(config.auth))
    app = create_app(Room(config, Upstreams(config)), gate, Metrics())
    paths = {path.replace(":path", "") for path in _paths(app.routes)}
    assert paths == ROLES.keys() | NO_CREDENTIALS | WAY_IN

    @app.get("/forgotten")
    def forgotten() -> str:
        return "nobody has said who may read this"

    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://gateway") as http:
        assert (await http.get("/healthz")).status_code == 200
        answer = await http.get("/forgotten")
    assert answer.status_code == 404 and "/forgotten" in answer.json()["error"]["message"]


def _paths(routes: Sequence[Any]) -> Iterator[str]:
    for route in routes:
        nested = getattr(route, "original_router", None)
        yield from _paths(nested.routes) if nested is not None else [route.path]
