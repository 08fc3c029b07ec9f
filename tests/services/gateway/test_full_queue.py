"""A full queue behind the gateway is the caller's to wait for: it is told at once, and the service asked only once."""

import asyncio
import threading
import time

from tests.services.gateway.conftest import gateway
from tests.services.reward_room import serving

SLOW_S = 1.5
"""Of the batch before: the reward service tells later callers to come again after as long."""
REFUSED = {"service": "trimtab.v1.RewardService", "method": "Score", "code": "RESOURCE_EXHAUSTED"}
BODY = {"items": [{"prompt": "w1", "response": "w2"}]}


async def test_a_full_queue_is_429_before_its_time_to_come_again_and_asked_once(reward_folder):
    async with serving(reward_folder, queue_limit=1) as peer, gateway(reward=peer.server.address) as edge:
        context = peer.server.context
        value = context.metrics.registry.get_sample_value
        slow = asyncio.create_task(context.worker.run(time.sleep, SLOW_S))
        assert (await edge.http.post("/v1/score", json=BODY)).status_code == 200
        await slow
        release = threading.Event()
        held = asyncio.create_task(context.worker.run(release.wait, 20))
        on_the_device = asyncio.create_task(edge.http.post("/v1/score", json=BODY))
        await asyncio.sleep(0.3)  # else the two would be one batch
        in_the_queue = asyncio.create_task(edge.http.post("/v1/score", json=BODY))
        async with asyncio.timeout(10):
            while value("trimtab_queue_depth") != 1:  # noqa: ASYNC110 -- the queue tells nobody
                await asyncio.sleep(0.01)
        started = time.monotonic()
        refused = await edge.http.post("/v1/score", json=BODY)
        took_s = time.monotonic() - started
        release.set()
        await held
        answered = [(await call).status_code for call in (on_the_device, in_the_queue)]
        counted = value("trimtab_requests_total", REFUSED)
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "RESOURCE_EXHAUSTED"
    assert int(refused.headers["retry-after"]) >= SLOW_S
    assert took_s < SLOW_S / 2
    assert counted == 1 and answered == [200, 200]
