"""Every gRPC service of trimtab in one process, with tiny models, the gateway's too: `every_service.py FOLDER`.

FOLDER holds policy/, reward/ and store/. Writes FOLDER/addresses.json once all serve; ends when stdin does.
"""

import asyncio
import json
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from trimtab.gateway import service as gateway
from trimtab.gateway.config import GatewayConfig
from trimtab.generator import service as generator
from trimtab.generator.config import GeneratorConfig
from trimtab.reference import service as reference
from trimtab.reference.config import ReferenceConfig
from trimtab.reward import service as reward
from trimtab.reward.config import RewardConfig
from trimtab.runtime.config import RequestLimits, ServiceConfig
from trimtab.runtime.logs import configure_logs
from trimtab.runtime.server import RunningServer
from trimtab.trainer import service as trainer
from trimtab.trainer.config import TrainerConfig

RULE_S = 20.0
"""A rule's second by default is too short for a machine that runs other tests too."""
SCORERS = {
    "words": {"kind": "length", "timeout_s": RULE_S},
    "digits": {"kind": "regex", "pattern": r"\d+", "timeout_s": RULE_S},
    "exact": {"kind": "answer", "timeout_s": RULE_S},
    "blend": {"kind": "sum", "weights": {"model": 1.0, "words": 0.1}},
}


async def main(folder: Path) -> None:
    configure_logs("error", "json")
    shared: dict[str, Any] = {
        "port": 0,
        "metrics_port": None,
        "threads": 1,
        "store": str(folder / "store"),
        "limits": RequestLimits(max_sequences=64, max_tokens=2000, max_message_bytes=4 * 1024 * 1024),
    }
    policy = str(folder / "policy")
    rooms = {
        "generator": (generator, GeneratorConfig(model=policy, default_max_tokens=4, **shared)),
        "reward": (
            reward,
            RewardConfig(model="version:rm/reward", scorers=SCORERS, default="model", **shared),  # type: ignore[arg-type]
        ),
        "reference": (reference, ReferenceConfig(model=policy, **shared)),
        "trainer": (trainer, TrainerConfig(folder=folder / "runs", **shared)),
    }
    async with AsyncExitStack() as stack:
        addresses: dict[str, str] = {}

        async def run(label: str, room: Any, config: ServiceConfig) -> None:
            server = RunningServer(label, config, services=room.SERVICES, load=room.load)
            await stack.enter_async_context(server)
            addresses[label] = server.address
            if "http_port" in server.context.ports:
                addresses["http"] = f"127.0.0.1:{server.context.ports['http_port']}"

        for label, (room, config) in rooms.items():
            await run(label, room, config)
        del shared["store"]
        behind = {name: addresses[name] for name in ("reward", "generator")}
        await run("gateway", gateway, GatewayConfig(**behind, http_port=0, requests_per_s=None, **shared))
        partial = folder / "addresses.partial"
        partial.write_text(json.dumps(addresses))
        partial.rename(folder / "addresses.json")
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
