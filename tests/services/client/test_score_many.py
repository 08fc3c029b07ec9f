"""`score_many`: any number of rows, in order, in bounded memory, whatever the servers do meanwhile."""

import asyncio
import io
import itertools
import sys

import pytest

from tests.services.client.conftest import Room
from tests.services.client.test_client_renewal import server
from trimtab.runtime.errors import exhausted, invalid
from trimtab_client import AsyncRewardClient, ChannelOptions, InvalidArgument, RewardClient
from trimtab_client.progress import Progress

OPTIONS = ChannelOptions(timeout_s=20)


def pairs(count: int):
    """(prompt, response) rows whose score, in the test's room, is the response's length."""
    return (("", "x" * (index % 7)) for index in range(count))


async def taken(style: str, addresses, rows, **named) -> list:
    if style == "asyncio":
        async with AsyncRewardClient(addresses, OPTIONS) as client:
            return [one async for one in client.score_many(rows, **named)]

    def take() -> list:
        with RewardClient(addresses, OPTIONS) as client:
            return list(client.score_many(rows, **named))

    return await asyncio.to_thread(take)


@pytest.mark.parametrize("style", ["sync", "asyncio"])
async def test_rows_come_back_in_order_over_several_servers(style, rooms):
    servers = [await rooms(max_sequences=8) for _ in range(2)]
    servers[0].score_delay_s = 0.02
    found = await taken(style, [room.address for room in servers], pairs(100), batch_rows=16)
    assert [one.score for one in found] == [index % 7 for index in range(100)]
    assert [one.normalized_score for one in found] == [index % 7 + 1 for index in range(100)]
    assert found[5].row == ("", "x" * 5) and not found[5].truncated and found[5].version.step == 7
    assert all(len(call.texts.items) <= 8 for room in servers for call in room.calls["Score"])
    assert all(room.calls["Score"] for room in servers)


@pytest.mark.parametrize("style", ["sync", "asyncio"])
async def test_pairs_and_conversations_may_be_mixed(style, rooms):
    room = await rooms()
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    found = await taken(style, room.address, [("", "xxx"), chat, chat, ("", "x")])
    assert [one.score for one in found] == [3, 2, 2, 1]


@pytest.mark.parametrize("style", ["sync", "asyncio"])
async def test_a_slow_reader_and_a_fast_source_keep_few_batches_in_hand(style, rooms):
    room = await rooms()
    drawn = itertools.count()

    def source():
        while True:
            next(drawn)
            yield ("", "x")

    async def read_five() -> None:
        if style == "asyncio":
            async with AsyncRewardClient(room.address, OPTIONS) as client:
                stream = client.score_many(source(), batch_rows=10, at_once=3)
                for _ in range(5):
                    await anext(stream)
                await stream.aclose()
        else:

            def read() -> None:
                with RewardClient(room.address, OPTIONS) as client:
                    stream = client.score_many(source(), batch_rows=10, at_once=3)
                    for _ in range(5):
                        next(stream)
                    stream.close()

            await asyncio.to_thread(read)

    await read_five()
    assert next(drawn) <= 10 * 2 * 3 + 1


@pytest.mark.parametrize("style", ["sync", "asyncio"])
async def test_a_full_queue_is_waited_for_and_a_wrong_row_ends_it_after_what_came_before(style, rooms):
    room = await rooms()
    room.failures["Score"].append(exhausted("full", retry_after_s=0.01))
    assert len(await taken(style, room.address, pairs(30), batch_rows=10)) == 30
    room.failures["Score"].append(invalid("texts.items[3]", "too long"))
    with pytest.raises(InvalidArgument, match="too long"):
        await taken(style, room.address, pairs(30), batch_rows=10, at_once=1)
    with pytest.raises(ValueError, match="a row is a"):
        await taken(style, room.address, ["just a text"])


async def test_an_asynchronous_source_is_read_as_it_comes(rooms):
    room = await rooms()

    async def source():
        for row in pairs(25):
            await asyncio.sleep(0)
            yield row

    async with AsyncRewardClient(room.address, OPTIONS) as client:
        assert [one.score async for one in client.score_many(source(), batch_rows=4)] == [i % 7 for i in range(25)]


class Forgetful(Room):
    """A room that keeps nothing of its calls."""

    async def enter(self, method, request, context) -> None:
        pass


MEMORY = """
import asyncio, re, sys
from trimtab_client import AsyncRewardClient, RewardClient

address, style, counts = sys.argv[1], sys.argv[2], [int(count) for count in sys.argv[3:]]
rows = lambda count: ((f"prompt {i} " + "p" * 150, "r" * (i % 100)) for i in range(count))
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

async def many(count):
    async with AsyncRewardClient(address) as client:
        total = 0
        async for one in client.score_many(rows(count), batch_rows=500):
            total += one.score if one.score == 99 else 0
        return total

def many_blocking(count):
    with RewardClient(address) as client:
        return sum(one.score for one in client.score_many(rows(count), batch_rows=500) if one.score == 99)

for count in counts:
    assert (asyncio.run(many(count)) if style == "asyncio" else many_blocking(count)) == 99 * (count // 100)
    print(peak())
"""


@pytest.mark.parametrize("style", ["sync", "asyncio"])
async def test_memory_does_not_grow_with_the_number_of_rows(style):
    async with server(Forgetful()) as running:
        command = [sys.executable, "-c", MEMORY, running.address, style, "20000", "200000"]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        out, _ = await asyncio.wait_for(process.communicate(), 300)
    assert process.returncode == 0
    few, many = map(int, out.split())
    assert many < few + 12 * 2**20  # the rows alone are 50 MiB


def test_progress_is_a_bar_redrawn_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    progress = Progress(True, total=200, stream=shown)
    progress._last_s -= 10
    progress.add(100)
    progress.add(100)
    progress.done()
    text = shown.getvalue()
    half, whole = "#" * 12 + "." * 12, "#" * 24
    assert text.startswith(f"\r\x1b[2K[{half}]  50 %  100 rows") and text.endswith("left\n")
    assert f"[{whole}] 100 %  200 rows" in text
    silent = Progress(False)
    silent.add(1)
    silent.done()
