"""Every RPC of every service is refused without the right credentials, and done with them."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import grpc.aio
import pytest
from cryptography import x509
from grpc import StatusCode

from tests.services.authority import LOOPBACK, Authority
from tests.services.every_method import HEALTH, Method, methods, servants, services
from tests.services.token_issuer import TokenIssuer
from trimtab.runtime import calls
from trimtab.runtime.auth_config import AuthConfig
from trimtab.runtime.config import ServiceConfig
from trimtab.runtime.keys import add_key
from trimtab.runtime.roles import ANY, PUBLIC, ROLES, RULES, rule_of
from trimtab.runtime.server import RunningServer, ServerContext, Service

OK, UNKNOWN_CALLER, DENIED = StatusCode.OK, StatusCode.UNAUTHENTICATED, StatusCode.PERMISSION_DENIED
ISSUER = "https://issuer.example"
EVERY_METHOD = methods()
ALL = tuple(sorted(ROLES))


def needs(method: Method) -> str:
    rule = rule_of(method.path)
    assert rule is not None, f"{method.path} has no rule: add it to trimtab.runtime.roles"
    return rule.needs


def server(config: ServiceConfig) -> RunningServer:
    async def load(context: ServerContext) -> list[Service]:
        return list(servants())

    return RunningServer("every", config, services=list(services()), load=load)


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def issuer() -> TokenIssuer:
    return TokenIssuer(ISSUER)


@pytest.fixture(scope="module")
def tls(authority) -> dict[str, Path]:
    cert, key = authority.issue("server", LOOPBACK)
    return {"tls_cert": cert, "tls_key": key}


@pytest.fixture
def keys_file(tmp_path) -> Path:
    return tmp_path / "keys.yaml"


@pytest.fixture
async def by_token(
    tls, authority, issuer, keys_file, tmp_path
) -> AsyncIterator[tuple[RunningServer, grpc.aio.Channel]]:
    add_key(keys_file, "somebody", ["label"])
    jwt = {
        "issuer": ISSUER,
        "audience": "trimtab",
        "jwks": str(issuer.write(tmp_path / "jwks.json")),
        "subjects": {"all": ALL, "but-*": ()} | {f"but-{role}": tuple(set(ALL) - {role}) for role in ALL},
        "leeway_s": 0,
    }
    auth = AuthConfig.model_validate({"keys_file": keys_file, "jwt": [jwt], "audit_file": tmp_path / "audit.jsonl"})
    async with (
        server(ServiceConfig(metrics_port=None, auth=auth, **tls)) as running,
        grpc.aio.secure_channel(running.address, credentials(authority)) as channel,
    ):
        yield running, channel


def credentials(authority: Authority, own: tuple[Path, Path] | None = None) -> grpc.ChannelCredentials:
    cert, key = (path.read_bytes() for path in own) if own else (None, None)
    return grpc.ssl_channel_credentials(authority.ca.read_bytes(), key, cert)


async def outcomes(channel: grpc.aio.Channel, token: str | None) -> dict[str, StatusCode]:
    return {method.path: await method.call(channel, token) for method in EVERY_METHOD}


def everywhere(code: StatusCode) -> dict[str, StatusCode]:
    return {method.path: code for method in EVERY_METHOD}


def test_the_table_knows_every_method_and_only_health_is_public():
    assert {method.path for method in EVERY_METHOD} <= RULES.keys()
    assert {path for path, rule in RULES.items() if rule.needs == PUBLIC} == set(HEALTH)
    assert {rule.needs for rule in RULES.values()} <= ROLES | {ANY, PUBLIC}
    assert len(EVERY_METHOD) > 12


def test_each_service_needs_the_role_of_its_work():
    works = {
        "RewardService": "score",
        "GeneratorService": "generate",
        "ReferenceService": "logprobs",
        "TrainerService": "train",
    }
    for method in EVERY_METHOD:
        service, name = method.path.rsplit(".", 1)[1].split("/")
        if service in works:
            assert needs(method) == works[service]
        elif name == "LoadVersion":
            assert needs(method) == "admin"


async def test_no_credentials_open_nothing(by_token):
    assert await outcomes(by_token[1], None) == everywhere(UNKNOWN_CALLER)


async def test_a_stranger_is_refused_before_the_request_is_waited_for(by_token):
    """So nobody without credentials makes a server hold a message, nor a call open by not sending it."""
    for method in EVERY_METHOD:
        call = by_token[1].stream_unary(method.path)()
        assert await asyncio.wait_for(call.code(), 5) == UNKNOWN_CALLER


async def test_a_request_that_does_not_come_is_given_up(by_token, keys_file, monkeypatch):
    monkeypatch.setattr(calls, "ARRIVAL_S", 0.2)
    _, token = add_key(keys_file, "right", ALL)
    bearer = [("authorization", f"Bearer {token}")]
    withheld = by_token[1].stream_unary("/trimtab.v1.RewardService/Score")(metadata=bearer)
    assert await asyncio.wait_for(withheld.code(), 5) == StatusCode.DEADLINE_EXCEEDED
    assert "did not arrive within 0.2 s" in await withheld.details()
    none = by_token[1].stream_unary("/trimtab.v1.RewardService/Score")(metadata=bearer)
    await none.done_writing()
    assert await asyncio.wait_for(none.code(), 5) == StatusCode.INVALID_ARGUMENT


async def test_wrong_keys_open_nothing(by_token, keys_file):
    key, token = add_key(keys_file, "right", ALL)
    forged = f"tt_{key.id}_{'A' * 43}"
    for wrong in ("x", token[:-1], token + "A", forged, "tt_000000000000_" + "A" * 43):
        assert await outcomes(by_token[1], wrong) == everywhere(UNKNOWN_CALLER)
    assert await outcomes(by_token[1], token) == everywhere(OK)


async def test_wrong_tokens_open_nothing(by_token, issuer):
    wrong = {
        "signed by another": TokenIssuer(ISSUER).token("all"),
        "of another issuer": TokenIssuer("https://other.example").token("all"),
        "for another audience": issuer.token("all", aud="other"),
        "without an audience": issuer.token("all", aud=None),
        "without an end": issuer.token("all", exp=None),
        "of nobody": issuer.token("all", sub=None),
        "not valid yet": issuer.token("all", nbf=4102444800),
        "unsigned": issuer.token("all", algorithm="none"),
        "signed with a shared secret": issuer.token("all", algorithm="HS256"),
    }
    for what, token in wrong.items():
        assert await outcomes(by_token[1], token) == everywhere(UNKNOWN_CALLER), what
    assert await outcomes(by_token[1], issuer.token("all")) == everywhere(OK)


async def test_expired_credentials_open_nothing(by_token, issuer, keys_file):
    _, key = add_key(keys_file, "past", ALL, expires=datetime.now(UTC) - timedelta(seconds=1))
    for token in (key, issuer.token("all", ends_in_s=-1)):
        assert await outcomes(by_token[1], token) == everywhere(UNKNOWN_CALLER)


async def test_every_role_but_the_needed_one_is_not_enough(by_token, issuer, keys_file):
    _, channel = by_token
    for role in ALL:
        _, key = add_key(keys_file, f"but-{role}", [other for other in ALL if other != role])
        expected = {method.path: DENIED if needs(method) == role else OK for method in EVERY_METHOD}
        assert await outcomes(channel, key) == expected
        assert await outcomes(channel, issuer.token(f"but-{role}")) == expected


async def test_a_role_alone_opens_its_own_methods_and_no_others(by_token, keys_file):
    for role in ALL:
        _, key = add_key(keys_file, f"only-{role}", [role])
        expected = {method.path: OK if needs(method) in (role, ANY) else DENIED for method in EVERY_METHOD}
        assert await outcomes(by_token[1], key) == expected


async def test_while_it_loads_callers_are_checked_all_the_same(tls, authority, keys_file):
    _, token = add_key(keys_file, "a", ["score"])
    auth = AuthConfig(keys_file=keys_file)

    async def load(context: ServerContext) -> list[Service]:
        await context.draining.wait()
        return []

    config = ServiceConfig(metrics_port=None, auth=auth, **tls)
    async with (
        RunningServer("every", config, services=list(services()), load=load, wait_loaded=False) as running,
        grpc.aio.secure_channel(running.address, credentials(authority)) as channel,
    ):
        for method in EVERY_METHOD:
            assert await method.call(channel) == UNKNOWN_CALLER
        score = Method("/trimtab.v1.RewardService/Score")
        assert await score.call(channel, token) == StatusCode.UNAVAILABLE


async def test_certificates_are_asked_for_and_have_the_roles_of_their_names(tls, authority, tmp_path):
    names = {f"only-{role}.example": [role] for role in ALL} | {"spiffe://c/ns/a/sa/all": list(ALL)}
    auth = AuthConfig.model_validate({"certificates": names})
    config = ServiceConfig(metrics_port=None, auth=auth, tls_client_ca=authority.ca, **tls)
    async with server(config) as running:

        async def seen(own: tuple[Path, Path] | None) -> dict[str, StatusCode]:
            async with grpc.aio.secure_channel(running.address, credentials(authority, own)) as channel:
                return await outcomes(channel, None)

        nowhere = everywhere(StatusCode.UNAVAILABLE)
        right = x509.UniformResourceIdentifier("spiffe://c/ns/a/sa/all")
        assert await seen(None) == nowhere
        assert await seen(authority.issue("late", right, ended=True)) == nowhere
        assert await seen(Authority.make(tmp_path / "other").issue("foreign", right)) == nowhere
        assert await seen(authority.issue("stranger", x509.DNSName("stranger.example"))) == everywhere(UNKNOWN_CALLER)
        assert await seen(authority.issue("all", right)) == everywhere(OK)
        for role in ("score", "admin"):
            expected = {method.path: OK if needs(method) in (role, ANY) else DENIED for method in EVERY_METHOD}
            assert await seen(authority.issue("only", x509.DNSName(f"only-{role}.example"))) == expected


async def test_health_is_open_to_probes_without_credentials(by_token):
    assert await Method("/grpc.health.v1.Health/Check").call(by_token[1]) == OK


async def test_admin_acts_are_in_the_audit_log_with_who_what_and_outcome_and_no_token(by_token, keys_file, tmp_path):
    _, channel = by_token
    _, allowed = add_key(keys_file, "lead", ["admin", "train", "score"])
    _, refused = add_key(keys_file, "scorer", ["score"])
    for token in (allowed, refused, "tt_unknown"):
        for method in EVERY_METHOD:
            await method.call(channel, token)
    text = (tmp_path / "audit.jsonl").read_text()
    acts = [json.loads(line) for line in text.splitlines()]
    audited = {path for path, rule in RULES.items() if rule.audited}
    assert {(act["who"], act["what"], act["outcome"]) for act in acts} == {
        (who, path, outcome) for path in audited for who, outcome in (("key:lead", "OK"), ("key:scorer", DENIED.name))
    }
    assert all(datetime.fromisoformat(act["when"]) and act["peer"] for act in acts)
    assert allowed not in text and refused not in text
