"""One sample is followed through generator, reward, reference and trainer, by what a real OTLP collector receives."""

import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

import trimtab.generator.service as generator_service
import trimtab.reference.service as reference_service
import trimtab.reward.service as reward_service
import trimtab.trainer.service as trainer_service
from tests.services.test_trainer import COMMON, finished, ppo_config
from trimtab.generator.config import GeneratorConfig
from trimtab.reference.config import ReferenceConfig
from trimtab.reward.config import RewardConfig
from trimtab.runtime.server import RunningServer
from trimtab.trainer.config import TrainerConfig
from trimtab_client import AsyncTrainerClient
from trimtab_client.v1 import trainer_pb2


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it is sent, by service name."""

    def __init__(self) -> None:
        self.spans: dict[str, list[Span]] = defaultdict(list)

    def Export(self, request, context):
        for resource in request.resource_spans:
            name = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
            self.spans[name] += [span for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    server = grpc.server(ThreadPoolExecutor(4))
    servicer = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(None)


def attribute(span: Span, key: str):
    value = next(a.value for a in span.attributes if a.key == key)
    if value.HasField("array_value"):
        return [each.int_value for each in value.array_value.values]
    return value.int_value if value.HasField("int_value") else value.string_value


async def test_spans_follow_one_sample_through_all_four_services(make_tiny, tmp_path: Path, collector) -> None:
    received, endpoint = collector
    spans = await run_one_step(make_tiny("policy"), make_tiny("reward", seed=3), tmp_path, endpoint, received)
    trainer = spans["trimtab-trainer"]
    rollouts = next(span for span in trainer if span.name == "rollouts")
    trace = [span for service in spans.values() for span in service if span.trace_id == rollouts.trace_id]
    by_id = {span.span_id: span for span in trace}

    sample = next(span for span in trace if span.name == "sample" and attribute(span, "trimtab.sample") == 3)
    seed = attribute(sample, "trimtab.seed")
    completion = next(span for span in spans["trimtab-generator"] if is_completion(span, seed))
    generate_call = by_id[completion.parent_span_id]
    assert generate_call.name == "trimtab.v1.GeneratorService/Generate"
    assert by_id[generate_call.parent_span_id].name == by_id[sample.parent_span_id].name == "generate"

    for service, stage, method in (
        ("trimtab-reward", "score", "trimtab.v1.RewardService/Score"),
        ("trimtab-reference", "reference", "trimtab.v1.ReferenceService/LogProbs"),
    ):
        worked = [span for span in trace if span.name == stage and 3 in attribute(span, "trimtab.samples")]
        assert len(worked) == 1 and sample.span_id in {link.span_id for link in worked[0].links}
        calls = [span for span in spans[service] if span.parent_span_id == worked[0].span_id]
        assert [call.name for call in calls] == [method]
        assert attribute(calls[0], "rpc.grpc.status_code") == "OK"
        assert by_id[worked[0].parent_span_id] is rollouts
    for name in ("train", "publish"):
        assert attribute(next(span for span in trace if span.name == name), "trimtab.step") == 1


def traced_config(model: Path, reward_model: Path, tmp_path: Path, addresses: list[str]) -> trainer_pb2.PpoConfig:
    return ppo_config(model, tmp_path, addresses, addresses[2], steps=1, value_model=str(reward_model))


def is_completion(span: Span, seed: str) -> bool:
    return span.name == "completion" and attribute(span, "trimtab.seed") == seed


async def run_one_step(
    model: Path, reward_model: Path, tmp_path: Path, endpoint: str, received: Collector
) -> dict[str, list[Span]]:
    """A PPO run of one step with all services in this process, their spans flushed by draining them."""
    common = COMMON | {"otlp_endpoint": endpoint, "store": str(tmp_path / "store")}
    rooms = [
        (generator_service, GeneratorConfig(**common, model=str(model))),
        (reference_service, ReferenceConfig(**common, model=str(model))),
        (reward_service, RewardConfig(**common, model=str(reward_model))),
        (trainer_service, TrainerConfig(**common, folder=tmp_path / "runs")),
    ]
    async with AsyncExitStack() as stack:
        addresses = []
        for room, config in rooms:
            server = RunningServer(room.LABEL, config, services=room.SERVICES, load=room.load)
            addresses.append((await stack.enter_async_context(server)).address)
        client = await stack.enter_async_context(AsyncTrainerClient(addresses[3]))
        await client.start("traced", traced_config(model, reward_model, tmp_path, addresses))
        status, _ = await finished(client, "traced")
        assert status.state == "succeeded", status.error
    return received.spans


def test_without_a_collector_nothing_of_opentelemetry_is_imported() -> None:
    program = (
        "import sys\nimport trimtab.runtime.server, trimtab_client\nfrom trimtab.runtime import tracing\n"
        "tracing.start('reward', None)\n"
        "with tracing.span('reward', 'work') as span: assert span is None\n"
        "assert tracing.current() is None\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
