"""Addresses, options and retries without a server."""

import time

import pytest

from trimtab_client import ChannelOptions, DataLoss, ResourceExhausted, Tls, Unavailable
from trimtab_client.channel import parse_addresses
from trimtab_client.credentials import Bearer
from trimtab_client.retries import RetryPlan, may_repeat

UNAVAILABLE = Unavailable("UNAVAILABLE", "loading")


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        ("localhost:1", ["localhost:1"]),
        ("a:1, b:2,", ["a:1", "b:2"]),
        (["a:1", "[::1]:2"], ["a:1", "[::1]:2"]),
        ("dns:///reward.example:7102", ["dns:///reward.example:7102"]),
        ("unix:/run/t.sock", ["unix:/run/t.sock"]),
    ],
)
def test_addresses_are_read(given, parsed):
    assert parse_addresses(given) == parsed


@pytest.mark.parametrize("wrong", ["", [], "host", ":1", "host:port", "host:0", "host:70000", "http://host:80"])
def test_wrong_addresses_are_refused(wrong):
    with pytest.raises(ValueError, match="host:port"):
        parse_addresses(wrong)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:1", "127.9.9.9:1", "localhost:1", "[::1]:1", "unix:/x", "dns:///localhost:1", "ipv4:127.0.0.1:1"],
)
def test_a_token_may_travel_in_the_clear_on_this_machine(address):
    assert Bearer(ChannelOptions(token="t"), [address]).metadata() == (("authorization", "Bearer t"),)


@pytest.mark.parametrize(
    "address",
    ["10.0.0.1:1", "reward:1", "localhost.example:1", "dns:///reward:1", "ipv4:127.0.0.1:1,10.0.0.1:2", "[::2]:1"],
)
def test_a_token_never_travels_in_the_clear_beyond_it(address):
    with pytest.raises(ValueError, match="needs TLS"):
        Bearer(ChannelOptions(token="t"), ["127.0.0.1:1", address])
    assert Bearer(ChannelOptions(token="t", tls=Tls()), [address]).metadata()


def test_a_token_is_not_shown():
    assert "s3cret" not in repr(ChannelOptions(token="s3cret"))


def test_a_token_is_given_once_and_its_file_holds_one(tmp_path):
    with pytest.raises(ValueError, match="not both"):
        ChannelOptions(token="t", token_file="f")
    file = tmp_path / "token"
    for content in ("", "\n", "a\nb"):
        file.write_text(content)
        with pytest.raises(ValueError, match="holds no token") as caught:
            Bearer(ChannelOptions(token_file=file), ["localhost:1"])
        assert "\n" not in str(caught.value)
    file.write_text("t0ken\n")
    assert Bearer(ChannelOptions(token_file=file), ["localhost:1"]).metadata() == (("authorization", "Bearer t0ken"),)
    with pytest.raises(FileNotFoundError):
        Bearer(ChannelOptions(token_file=tmp_path / "absent"), ["localhost:1"])


def test_a_certificate_without_its_key_is_refused():
    with pytest.raises(ValueError, match="cert and key"):
        Tls(cert="client.pem")


def test_only_a_busy_or_absent_server_is_asked_again():
    assert may_repeat(UNAVAILABLE)
    assert may_repeat(ResourceExhausted("RESOURCE_EXHAUSTED", "full", retry_after_s=1.0))
    assert not may_repeat(ResourceExhausted("RESOURCE_EXHAUSTED", "out of memory"))
    assert not may_repeat(DataLoss("DATA_LOSS", "digest"))


def test_delays_grow_with_jitter_up_to_the_limit():
    plans = [RetryPlan(9, time.monotonic() + 1e6) for _ in range(40)]
    for least, most in [(0.05, 0.1), (0.1, 0.2), (0.2, 0.4), (0.4, 0.8), (0.8, 1.6), (1.6, 3.2), (2.5, 5), (2.5, 5)]:
        waits = [plan.wait_s(UNAVAILABLE) for plan in plans]
        assert all(wait is not None and least <= wait <= most for wait in waits)
        assert len(set(waits)) > 1


def test_retries_are_counted_and_progress_starts_them_anew():
    plan = RetryPlan(2, time.monotonic() + 1e6)
    assert [plan.wait_s(UNAVAILABLE) is None for _ in range(3)] == [False, False, True]
    plan.progressed()
    assert plan.wait_s(UNAVAILABLE) is not None


def test_the_server_is_never_asked_sooner_than_it_said():
    full = ResourceExhausted("RESOURCE_EXHAUSTED", "full", retry_after_s=2.0)
    wait_s = RetryPlan(1, time.monotonic() + 1e6, other_addresses=3).wait_s(full)
    assert wait_s is not None and 2.0 < wait_s <= 2.1


def test_who_does_not_wait_for_a_full_queue_still_goes_to_other_addresses():
    plan = RetryPlan(1, time.monotonic() + 1e6, other_addresses=1, wait_when_full=False)
    assert plan.wait_s(ResourceExhausted("RESOURCE_EXHAUSTED", "full", retry_after_s=2.0)) is None
    assert plan.wait_s(UNAVAILABLE) == 0.0 and plan.wait_s(UNAVAILABLE)


def test_other_addresses_are_tried_at_once_and_count_as_no_retry():
    plan = RetryPlan(1, time.monotonic() + 1e6, other_addresses=2)
    waits = [plan.wait_s(UNAVAILABLE) for _ in range(4)]
    assert waits[:2] == [0.0, 0.0] and waits[2] and waits[3] is None


def test_what_may_not_be_repeated_is_not_sent_elsewhere():
    assert RetryPlan(0, time.monotonic() + 1e6, other_addresses=2).wait_s(UNAVAILABLE) is None


def test_no_try_after_the_deadline():
    assert RetryPlan(3, time.monotonic() + 0.01).wait_s(UNAVAILABLE) is None
