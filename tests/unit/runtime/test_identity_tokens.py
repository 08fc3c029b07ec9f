"""JSON Web Tokens against key sets from files and over https, with keys that change."""

import http.server
import json
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from grpc import StatusCode
from pydantic import ValidationError

from tests.services.authority import LOOPBACK, Authority
from tests.services.token_issuer import TokenIssuer
from trimtab.runtime import identity_tokens
from trimtab.runtime.auth import Authenticator
from trimtab.runtime.auth_config import AuthConfig, JwtIssuer
from trimtab.runtime.errors import ServiceError, StartError

SUBJECT = "system:serviceaccount:rl:trainer"


class KeySetServer:
    """Serves `answer` over https as an issuer does, and notes who asked."""

    def __init__(self, authority: Authority) -> None:
        self.answer: bytes = b""
        self.status = 200
        self.asked: list[str | None] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.headers.get("Authorization"))
                self.send_response(outer.status)
                if outer.status == 302:
                    self.send_header("Location", f"https://127.0.0.1:{outer.port}/elsewhere")
                self.end_headers()
                self.wfile.write(outer.answer)

            def log_message(self, *arguments: object) -> None:
                """Quiet."""

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*authority.issue("issuer", LOOPBACK))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.make(tmp_path / "authority")


@pytest.fixture
def key_sets(authority) -> Iterator[KeySetServer]:
    server = KeySetServer(authority)
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def issuer() -> TokenIssuer:
    return TokenIssuer()


def authenticator(issuer: TokenIssuer, jwks: str | Path, **changes) -> Authenticator:
    given = {"issuer": issuer.issuer, "audience": issuer.audience, "jwks": str(jwks), "subjects": {SUBJECT: ["score"]}}
    return Authenticator(AuthConfig(jwt=(JwtIssuer.model_validate({**given, **changes}),)))


def known(made: Authenticator, token: str) -> set[str]:
    return set(made.authenticate({"authorization": f"Bearer {token}"}).roles)


def refusal(made: Authenticator, token: str, code: StatusCode = StatusCode.UNAUTHENTICATED) -> str:
    with pytest.raises(ServiceError) as caught:
        made.authenticate({"authorization": f"Bearer {token}"})
    assert caught.value.code == code and token not in caught.value.message
    return caught.value.message


def test_a_service_account_has_the_roles_of_its_subject(issuer, tmp_path):
    made = authenticator(issuer, issuer.write(tmp_path / "jwks"), subjects={"system:serviceaccount:rl:*": ["score"]})
    principal = made.authenticate({"authorization": f"Bearer {issuer.token(SUBJECT)}"})
    assert (principal.name, set(principal.roles)) == (f"token:{SUBJECT}", {"score"})
    assert known(made, issuer.token("system:serviceaccount:other:trainer")) == set()


@pytest.mark.parametrize(
    ("claim", "value"),
    [("roles", ["train", "fly"]), ("realm_access", {"roles": ["train"]}), ("roles", "train fly")],
)
def test_roles_can_come_from_a_claim_and_unknown_ones_are_passed_over(issuer, tmp_path, claim, value):
    path = "realm_access.roles" if claim == "realm_access" else claim
    made = authenticator(issuer, issuer.write(tmp_path / "jwks"), subjects={}, roles_claim=path)
    assert known(made, issuer.token("anna", **{claim: value})) == {"train"}
    assert known(made, issuer.token("bob", **{claim: 7})) == set()


def test_each_refusal_says_what_is_wrong(issuer, tmp_path):
    made = authenticator(issuer, issuer.write(tmp_path / "jwks"), leeway_s=0)
    assert "expired" in refusal(made, issuer.token(SUBJECT, ends_in_s=-1))
    assert "another audience" in refusal(made, issuer.token(SUBJECT, aud="other"))
    assert "issuer is not believed" in refusal(made, issuer.token(SUBJECT, iss="https://other"))
    assert "no claim 'exp'" in refusal(made, issuer.token(SUBJECT, exp=None))
    assert "compare the clocks" in refusal(made, issuer.token(SUBJECT, nbf=4102444800))
    assert "signature" in refusal(made, issuer.token(SUBJECT)[:-6] + "AAAAAA")
    assert "public key's algorithm" in refusal(made, issuer.token(SUBJECT, algorithm="none"))


def test_clocks_may_disagree_by_the_leeway(issuer, tmp_path):
    jwks = issuer.write(tmp_path / "jwks")
    token = issuer.token(SUBJECT, ends_in_s=-20)
    assert known(authenticator(issuer, jwks, leeway_s=60), token) == {"score"}
    assert "expired" in refusal(authenticator(issuer, jwks, leeway_s=5), token)


def test_a_key_set_is_fetched_once_and_anew_for_an_unknown_key_but_not_at_anybodys_pace(
    issuer, key_sets, authority, tmp_path, monkeypatch
):
    (tmp_path / "own-token").write_text("own\n")
    key_sets.answer = json.dumps(issuer.key_set).encode()
    address = f"https://127.0.0.1:{key_sets.port}/jwks"
    made = authenticator(issuer, address, jwks_ca=authority.ca, jwks_token_file=tmp_path / "own-token")
    for subject in ("a", "b", "c"):
        known(made, issuer.token(subject))
    assert key_sets.asked == ["Bearer own"]
    issuer.rotate()
    key_sets.answer = json.dumps(issuer.key_set).encode()
    for _ in range(20):
        assert "does not list" in refusal(made, issuer.token(SUBJECT))
    assert len(key_sets.asked) == 1
    monkeypatch.setattr(identity_tokens, "SHORTEST_PAUSE_S", 0.0)
    assert known(made, issuer.token(SUBJECT)) == {"score"}
    assert len(key_sets.asked) == 2


def test_known_keys_outlast_an_issuer_that_is_down(issuer, key_sets, authority, monkeypatch):
    monkeypatch.setattr(identity_tokens, "SHORTEST_PAUSE_S", 0.0)
    key_sets.answer = json.dumps(issuer.key_set).encode()
    address = f"https://127.0.0.1:{key_sets.port}/jwks"
    made = authenticator(issuer, address, jwks_ca=authority.ca, cache_s=0.001)
    assert known(made, issuer.token(SUBJECT)) == {"score"}
    for status, answer in ((503, b"down"), (200, b"not json"), (200, b'{"keys": []}')):
        key_sets.status, key_sets.answer = status, answer
        assert known(made, issuer.token(SUBJECT, jti=f"{status}{answer}")) == {"score"}


@pytest.mark.parametrize("status", [500, 302])
def test_without_any_key_the_caller_is_told_to_come_again(issuer, key_sets, authority, status):
    key_sets.status = status
    made = authenticator(issuer, f"https://127.0.0.1:{key_sets.port}/jwks", jwks_ca=authority.ca)
    assert "cannot be read now" in refusal(made, issuer.token(SUBJECT), StatusCode.UNAVAILABLE)
    assert len(key_sets.asked) == 1  # no redirection is followed


def test_an_issuer_of_another_authority_is_not_asked(issuer, key_sets, tmp_path):
    key_sets.answer = json.dumps(issuer.key_set).encode()
    other = Authority.make(tmp_path / "other")
    made = authenticator(issuer, f"https://127.0.0.1:{key_sets.port}/jwks", jwks_ca=other.ca)
    refusal(made, issuer.token(SUBJECT), StatusCode.UNAVAILABLE)
    assert key_sets.asked == []


@pytest.mark.parametrize("content", [None, "{", "{}", '{"keys": [{"kty": "oct", "k": "AAAA"}]}'])
def test_an_unusable_key_set_file_is_named_at_start(issuer, tmp_path, content):
    path = tmp_path / "jwks"
    if content is not None:
        path.write_text(content)
    with pytest.raises(StartError, match=r"^auth\.jwt\.jwks: .*jwks"):
        authenticator(issuer, path)


@pytest.mark.parametrize(
    ("jwks", "subjects", "reason"), [("http://issuer/jwks", {"a": ["score"]}, "plain http"), ("f", {}, "roles_claim")]
)
def test_settings_that_would_be_unsafe_or_useless_are_refused(jwks, subjects, reason):
    with pytest.raises(ValidationError, match=reason):
        JwtIssuer(issuer="https://issuer", audience="trimtab", jwks=jwks, subjects=subjects)
