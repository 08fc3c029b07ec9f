"""A PPO run in which every call is made over mTLS, each side with no more roles than it needs."""

import json
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from cryptography import x509

from tests.services.authority import LOOPBACK, Authority
from tests.services.test_trainer import COMMON, finished, ppo_config
from trimtab.generator import service as generator_service
from trimtab.generator.config import GeneratorConfig
from trimtab.reference import service as reference_service
from trimtab.reference.config import ReferenceConfig
from trimtab.reward import service as reward_service
from trimtab.reward.config import RewardConfig
from trimtab.runtime.server import RunningServer
from trimtab.trainer import service as trainer_service
from trimtab.trainer.config import TrainerConfig
from trimtab_client import AsyncTrainerClient, ChannelOptions, PermissionDenied, Tls


async def test_a_run_over_mtls_needs_these_roles_and_no_others(make_tiny, tmp_path: Path):
    authority = Authority.make(tmp_path / "authority")
    trainer_pair = authority.issue("trainer", LOOPBACK, x509.DNSName("trainer.example"))
    person = authority.issue("person", x509.DNSName("person.example"))
    roles = {"trainer.example": ("generate", "score", "logprobs", "admin"), "person.example": ("train",)}
    cert, key = authority.issue("service", LOOPBACK)
    secured = {"tls_client_ca": authority.ca, "auth": {"certificates": roles, "audit_file": tmp_path / "audit.jsonl"}}
    policy, reward_model, store = make_tiny("policy"), make_tiny("reward", seed=3), str(tmp_path / "store")
    rooms = [
        (generator_service, GeneratorConfig, policy),
        (reference_service, ReferenceConfig, policy),
        (reward_service, RewardConfig, reward_model),
    ]
    async with AsyncExitStack() as stack:
        addresses = []
        for room, config_class, model in rooms:
            config = config_class(**COMMON, **secured, tls_cert=cert, tls_key=key, model=str(model), store=store)
            server = RunningServer(room.LABEL, config, services=room.SERVICES, load=room.load)
            addresses.append((await stack.enter_async_context(server)).address)
        services = {"tls_ca": authority.ca, "tls_cert": trainer_pair[0], "tls_key": trainer_pair[1]}
        trainer_config = TrainerConfig(
            **COMMON,
            **secured,
            tls_cert=trainer_pair[0],
            tls_key=trainer_pair[1],
            store=store,
            folder=tmp_path / "runs",
            services=services,
        )
        trainer = RunningServer(
            trainer_service.LABEL, trainer_config, services=trainer_service.SERVICES, load=trainer_service.load
        )
        await stack.enter_async_context(trainer)
        options = ChannelOptions(tls=Tls(authority.ca, *person), timeout_s=30)
        client = await stack.enter_async_context(AsyncTrainerClient(trainer.address, options))
        config = ppo_config(policy, tmp_path, addresses, addresses[2], value_model=str(reward_model), steps=1)
        await client.start("secured", config)
        status, _ = await finished(client, "secured")
        assert status.state == "succeeded", status.error
        own = ChannelOptions(tls=Tls(authority.ca, *trainer_pair), timeout_s=30)
        async with AsyncTrainerClient(trainer.address, own) as other:
            with pytest.raises(PermissionDenied, match=r"trainer\.example lacks the role 'train'"):
                await other.stop("secured")
    acts = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    seen = {(act["who"], act["what"].rsplit("/", 1)[1], act["target"], act["outcome"]) for act in acts}
    assert ("certificate:person.example", "Start", "secured", "OK") in seen
    assert ("certificate:trainer.example", "LoadVersion", "secured/policy@1", "OK") in seen
    assert ("certificate:trainer.example", "Stop", "", "PERMISSION_DENIED") in seen
