"""Who is known by which credentials, and what a refusal says."""

import asyncio
import stat
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from grpc import StatusCode

from trimtab.runtime import auth
from trimtab.runtime.auth import ANYONE, LONGEST_LINE, REMEMBER_TOKENS, Authenticator, Principal, require
from trimtab.runtime.auth_config import AuthConfig
from trimtab.runtime.errors import ServiceError, StartError
from trimtab.runtime.keys import KeyFileError, add_key, matches, read_keys, revoke_key


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def refusal(authenticator: Authenticator, headers: dict[str, str]) -> str:
    with pytest.raises(ServiceError) as caught:
        authenticator.authenticate(headers)
    assert caught.value.code == StatusCode.UNAUTHENTICATED
    return caught.value.message


def test_a_key_is_known_by_name_and_roles(keys_file):
    _, token = add_key(keys_file, "trainer", ["score", "generate"])
    authenticator = Authenticator(AuthConfig(keys_file=keys_file))
    principal = authenticator.authenticate(bearer(token))
    assert principal == Principal("key:trainer", frozenset({"score", "generate"}))
    assert authenticator.authenticate([("authorization", f"bearer {token}".encode())]) == principal


def test_a_file_of_keys_holds_no_secret_and_only_its_owner_reads_it(keys_file):
    _, token = add_key(keys_file, "trainer", ["score"])
    content = keys_file.read_text()
    assert token.split("_", 2)[2] not in content
    assert "$argon2id$" in content
    assert stat.S_IMODE(keys_file.stat().st_mode) == 0o600


def test_each_wrong_credential_is_refused_with_what_is_missing(keys_file):
    key, token = add_key(keys_file, "trainer", ["score"])
    authenticator = Authenticator(AuthConfig(keys_file=keys_file))
    assert "wants a key" in refusal(authenticator, {})
    assert "write `Bearer`" in refusal(authenticator, {"authorization": f"Basic {token}"})
    for wrong in ("x", "tt_000000000000_" + "a" * 43, f"tt_{key.id}_" + "a" * 43, token + "x", "ey.a.b"):
        message = refusal(authenticator, bearer(wrong))
        assert wrong not in message
    assert token not in refusal(authenticator, bearer(f"tt_{key.id}_" + "a" * 43))


def test_a_revoked_key_ends_at_the_next_call_and_a_new_one_counts_at_once(keys_file):
    _, first = add_key(keys_file, "first", ["score"])
    authenticator = Authenticator(AuthConfig(keys_file=keys_file))
    authenticator.authenticate(bearer(first))
    _, second = add_key(keys_file, "second", ["train"])
    assert authenticator.authenticate(bearer(second)).name == "key:second"
    revoke_key(keys_file, "first")
    assert "not known" in refusal(authenticator, bearer(first))
    assert authenticator.authenticate(bearer(second)).name == "key:second"


def test_an_expired_key_is_refused_also_when_it_was_known_before(keys_file):
    _, token = add_key(keys_file, "brief", ["score"], expires=datetime.now(UTC) + timedelta(seconds=0.5))
    authenticator = Authenticator(AuthConfig(keys_file=keys_file))
    authenticator.authenticate(bearer(token))
    time.sleep(0.6)
    assert "expired" in refusal(authenticator, bearer(token))


def test_a_known_token_costs_no_hash(keys_file):
    _, token = add_key(keys_file, "trainer", ["score"])
    authenticator = Authenticator(AuthConfig(keys_file=keys_file))
    headers = bearer(token)
    authenticator.authenticate(headers)
    started_s = time.process_time()
    for _ in range(1000):
        authenticator.authenticate(headers)
    assert time.process_time() - started_s < 1.0  # a thousand hashes would take ten


def test_thousands_of_refused_tokens_leave_a_known_one_costing_no_hash(keys_file, monkeypatch):
    key, token = add_key(keys_file, "trainer", ["score"])
    authenticator = Authenticator(AuthConfig(keys_file=keys_file))
    hashed = []
    monkeypatch.setattr(auth, "matches", lambda key, token: hashed.append(token) or matches(key, token))
    authenticator.authenticate(bearer(token))
    for number in range(REMEMBER_TOKENS + 10):
        refusal(authenticator, bearer(f"tt_{number:012x}_{number:043d}"))
        refusal(authenticator, bearer(f"ey{number}.a.b"))
    wrong = f"tt_{key.id}_" + "a" * 43
    for _ in range(3):
        refusal(authenticator, bearer(wrong))
        assert authenticator.authenticate(bearer(token)).name == "key:trainer"
    assert hashed == [token, wrong]


async def test_a_full_line_of_wrong_secrets_stops_neither_the_other_kind_nor_what_costs_nothing(keys_file):
    key, token = add_key(keys_file, "trainer", ["score"])
    authenticator = Authenticator(AuthConfig(keys_file=keys_file))
    await authenticator.admit(bearer(token))
    wrong = [f"tt_{key.id}_{number:043d}" for number in range(LONGEST_LINE + 1)]
    waiting = [asyncio.create_task(authenticator.admit(bearer(each))) for each in wrong[1:]]
    await asyncio.sleep(0)
    codes = {}
    for name, other in {"one more": wrong[0], "unknown": f"tt_{0:012x}_" + "a" * 43, "jwt": "ey.a.b"}.items():
        with pytest.raises(ServiceError) as caught:
            await authenticator.admit(bearer(other))
        codes[name] = caught.value.code
    assert codes == {
        "one more": StatusCode.RESOURCE_EXHAUSTED,
        "unknown": StatusCode.UNAUTHENTICATED,
        "jwt": StatusCode.UNAUTHENTICATED,
    }
    assert (await authenticator.admit(bearer(token))).name == "key:trainer"
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    authenticator.close()


async def test_many_calls_with_one_new_token_are_checked_once_and_the_loop_goes_on(keys_file):
    _, token = add_key(keys_file, "trainer", ["score"])
    authenticator = Authenticator(AuthConfig(keys_file=keys_file))
    started_s = time.process_time()
    principals = await asyncio.gather(*(authenticator.admit(bearer(token)) for _ in range(60)))
    assert {principal.name for principal in principals} == {"key:trainer"}
    assert time.process_time() - started_s < 1.0
    authenticator.close()


def test_certificates_have_the_roles_of_their_names():
    table = {"trainer.example": ("score", "generate"), "spiffe://c/ns/rl/*": ("logprobs",)}
    authenticator = Authenticator(AuthConfig.model_validate({"certificates": table}))
    assert authenticator.authenticate({}, ["other", "trainer.example"]) == Principal(
        "certificate:trainer.example", frozenset({"score", "generate"})
    )
    both = authenticator.authenticate({}, ["spiffe://c/ns/rl/sa/a", "trainer.example"])
    assert both.roles == {"score", "generate", "logprobs"}
    with pytest.raises(ServiceError, match=r"names spiffe://c/ns/other have none"):
        authenticator.authenticate({}, ["spiffe://c/ns/other"])


def test_without_credentials_configured_everybody_is_anyone():
    assert Authenticator(AuthConfig()).authenticate({}) == ANYONE


def test_a_missing_role_is_named():
    with pytest.raises(ServiceError, match=r"key:a lacks the role 'train'.*its roles: score") as caught:
        require(Principal("key:a", frozenset({"score"})), "train")
    assert caught.value.code == StatusCode.PERMISSION_DENIED
    require(Principal("key:a", frozenset({"score"})), "score")


@pytest.mark.parametrize("content", [None, "keys: [", "keys: [{id: 1}]", "- a", "tokens: []"])
def test_an_unusable_file_of_keys_is_named_at_start(keys_file, content):
    if content is not None:
        keys_file.write_text(content)
    with pytest.raises(StartError, match=r"^keys_file: .*keys\.yaml") as caught:
        Authenticator(AuthConfig(keys_file=keys_file))
    assert "\n" not in str(caught.value)


def test_a_file_of_keys_that_breaks_later_leaves_the_known_ones_in_force(keys_file):
    _, token = add_key(keys_file, "trainer", ["score"])
    authenticator = Authenticator(AuthConfig(keys_file=keys_file))
    keys_file.write_text("keys: [")
    assert authenticator.authenticate(bearer(token)).name == "key:trainer"


def test_names_are_unique_and_roles_are_known(keys_file):
    add_key(keys_file, "a", ["score"])
    for name, roles, field in (("a", ["score"], "name"), ("b/c", ["score"], "name"), ("b", ["fly"], "role")):
        with pytest.raises(KeyFileError, match=f"^{field}: "):
            add_key(keys_file, name, roles)
    with pytest.raises(KeyFileError, match=r"^key: "):
        revoke_key(keys_file, "b")
    assert [key.name for key in read_keys(keys_file).values()] == ["a"]
