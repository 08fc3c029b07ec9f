"""What every server promises its callers, on a real port in this process."""

import asyncio
import subprocess
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from trimtab.runtime.auth_config import AuthConfig
from trimtab.runtime.config import RequestLimits, ServiceConfig
from trimtab.runtime.errors import StartError, exhausted, invalid
from trimtab.runtime.server import Load, RunningServer, ServerContext, Service
from trimtab_client.v1 import generator_pb2, generator_pb2_grpc

NAME = "trimtab.v1.GeneratorService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
Behaviour = Callable[[grpc.aio.ServicerContext], AsyncIterator[generator_pb2.GenerateResponse]]


class Scripted(generator_pb2_grpc.GeneratorServiceServicer):
    """Generate does what its test wrote."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour

    async def Generate(self, request, context):
        async for response in self.behaviour(context):
            yield response


def serving(behaviour: Behaviour) -> Load:
    async def load(context: ServerContext) -> list[Service]:
        return [Service(NAME, generator_pb2_grpc.add_GeneratorServiceServicer_to_server, Scripted(behaviour))]

    return load


def running(behaviour: Behaviour, **settings) -> RunningServer:
    config = ServiceConfig(**{"metrics_port": None, **settings})
    return RunningServer("scripted", config, services=[NAME], load=serving(behaviour))


async def one(context) -> AsyncIterator[generator_pb2.GenerateResponse]:
    yield generator_pb2.GenerateResponse(completion=generator_pb2.Completion(text="hello"))


async def generate(address: str, **kwargs) -> list[str]:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = generator_pb2_grpc.GeneratorServiceStub(channel)
        call = stub.Generate(generator_pb2.GenerateRequest(), timeout=kwargs.pop("timeout", 10), **kwargs)
        return [response.completion.text async for response in call]


async def failure(address: str, **kwargs) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(address, **kwargs)
    return caught.value


async def health(address: str, service: str = NAME) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
        return reply.status


def details(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    trailing = dict(error.trailing_metadata() or ())
    return status_pb2.Status.FromString(trailing["grpc-status-details-bin"])


async def test_a_loading_server_listens_is_not_serving_and_says_when_to_retry():
    go = asyncio.Event()

    async def load(context: ServerContext) -> list[Service]:
        await go.wait()
        return await serving(one)(context)

    server = RunningServer("scripted", ServiceConfig(), services=[NAME], load=load, wait_loaded=False)
    async with server:
        assert [await health(server.address, name) for name in (NAME, "")] == [NOT_SERVING, NOT_SERVING]
        error = await failure(server.address)
        assert error.code() == StatusCode.UNAVAILABLE
        retry = error_details_pb2.RetryInfo()
        assert details(error).details[0].Unpack(retry)
        assert retry.retry_delay.ToMilliseconds() > 0
        go.set()
        await server.loaded()
        assert [await health(server.address, name) for name in (NAME, "")] == [SERVING, SERVING]
        assert await generate(server.address) == ["hello"]


async def test_an_unknown_service_has_no_health():
    async with running(one) as server:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health(server.address, "trimtab.v1.Nothing")
        assert caught.value.code() == StatusCode.NOT_FOUND


async def test_a_connection_ends_at_its_age_and_cuts_no_stream_however_long():
    peers = []

    async def slow(context) -> AsyncIterator[generator_pb2.GenerateResponse]:
        peers.append(context.peer())
        for text in "abcd":
            await asyncio.sleep(0.25)
            yield generator_pb2.GenerateResponse(completion=generator_pb2.Completion(text=text))

    async with running(slow, connection_age_s=0.2) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = generator_pb2_grpc.GeneratorServiceStub(channel)
        for _ in range(2):
            call = stub.Generate(generator_pb2.GenerateRequest(), timeout=20)
            assert [response.completion.text async for response in call] == list("abcd")
    assert len(set(peers)) == 2, "the second call went over a new connection"


async def test_reflection_lists_the_services():
    async with running(one) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        reply = await call.read()
        assert {service.name for service in reply.list_services_response.service} >= {NAME, "grpc.health.v1.Health"}


async def test_a_refusal_names_its_field():
    async def refuse(context):
        raise invalid("prompts", "the batch is empty")
        yield

    async with running(refuse) as server:
        error = await failure(server.address)
    assert (error.code(), error.details()) == (StatusCode.INVALID_ARGUMENT, "prompts: the batch is empty")
    bad = error_details_pb2.BadRequest()
    assert details(error).details[0].Unpack(bad)
    assert bad.field_violations[0].field == "prompts"


async def test_a_defect_is_internal_and_shows_nothing_of_itself():
    async def defect(context):
        raise KeyError("the prompt was: secret")
        yield

    async with running(defect) as server:
        error = await failure(server.address)
        assert await health(server.address) == SERVING
    assert error.code() == StatusCode.INTERNAL
    assert "secret" not in (error.details() or "")
    assert "Traceback" not in (error.details() or "")


async def test_too_many_calls_at_once_are_exhausted_with_retry_info():
    go = asyncio.Event()

    async def wait(context):
        await go.wait()
        yield generator_pb2.GenerateResponse()

    async with running(wait, limits=RequestLimits(max_concurrent_calls=1)) as server:
        first = asyncio.create_task(generate(server.address))
        await asyncio.sleep(0.1)
        error = await failure(server.address)
        go.set()
        await first
    assert error.code() == StatusCode.RESOURCE_EXHAUSTED
    assert details(error).details[0].Is(error_details_pb2.RetryInfo.DESCRIPTOR)


async def test_a_message_over_the_limit_is_refused_before_it_is_read():
    async with (
        running(one, limits=RequestLimits(max_message_bytes=2048)) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        stub = generator_pb2_grpc.GeneratorServiceStub(channel)
        prompt = generator_pb2.Prompt(text="x" * 5000)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(generator_pb2.GenerateRequest(prompts=[prompt])).read()
        assert caught.value.code() == StatusCode.RESOURCE_EXHAUSTED


async def test_bytes_that_are_no_request_are_an_invalid_argument():
    async with running(one) as server, grpc.aio.insecure_channel(server.address) as channel:
        call = channel.unary_stream(f"/{NAME}/Generate")(b"\xff\xff\xff", timeout=10)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert await generate(server.address) == ["hello"]
    assert caught.value.code() == StatusCode.INVALID_ARGUMENT
    assert (caught.value.details() or "").startswith("request: ")


async def test_a_call_that_its_caller_drops_is_cancelled_in_the_server():
    cancelled = asyncio.Event()

    async def wait(context):
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        yield

    async with running(wait) as server:
        error = await failure(server.address, timeout=0.2)
        await asyncio.wait_for(cancelled.wait(), 5)
        await asyncio.sleep(0.05)
        codes = {
            sample.labels["code"]: sample.value
            for metric in server.context.metrics.requests.collect()
            for sample in metric.samples
            if sample.name.endswith("_total")
        }
    assert error.code() == StatusCode.DEADLINE_EXCEEDED
    assert sum(codes.values()) == 1
    assert set(codes) <= {"DEADLINE_EXCEEDED", "CANCELLED"}


async def test_metrics_count_calls_by_method_and_code_and_carry_no_content():
    async def refuse(context):
        yield generator_pb2.GenerateResponse()
        raise exhausted("full", retry_after_s=1)

    async with running(refuse, metrics_port=0) as server:
        await failure(server.address)
        url = f"http://127.0.0.1:{server.metrics_port}/metrics"
        page = (await asyncio.to_thread(lambda: urllib.request.urlopen(url).read())).decode()
    assert (
        'trimtab_requests_total{code="RESOURCE_EXHAUSTED",method="Generate",service="trimtab.v1.GeneratorService"} 1.0'
        in page
    )
    assert "trimtab_requests_in_flight 0.0" in page


async def test_draining_tells_health_watchers_and_does_not_wait_for_them():
    server = running(one, grace_s=30)
    async with server, grpc.aio.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=NAME))
        assert (await watch.read()).status == SERVING
        draining = asyncio.create_task(server.drain())
        assert (await watch.read()).status == NOT_SERVING
        await asyncio.wait_for(draining, 5)


async def test_one_watcher_that_leaves_does_not_leave_the_others_untold():
    async with running(one) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        leaves, stays = (stub.Watch(health_pb2.HealthCheckRequest(service=NAME)) for _ in range(2))
        assert [(await watch.read()).status for watch in (leaves, stays)] == [SERVING, SERVING]
        leaves.cancel()
        await asyncio.sleep(0.1)
        draining = asyncio.create_task(server.drain())
        assert (await asyncio.wait_for(stays.read(), 5)).status == NOT_SERVING
        await draining


async def test_background_tasks_end_and_closers_run_at_the_drain():
    events: list[str] = []

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            events.append("task ended")

    async def closer() -> None:
        events.append("closed")

    async def load(context: ServerContext) -> list[Service]:
        context.background(forever(), name="forever")
        context.on_close(closer)
        return await serving(one)(context)

    async with RunningServer("scripted", ServiceConfig(), services=[NAME], load=load):
        await asyncio.sleep(0)
    assert events == ["task ended", "closed"]


async def test_a_load_that_fails_is_raised_and_frees_the_port():
    async def load(context: ServerContext) -> list[Service]:
        raise StartError("model: no such folder")

    failed = RunningServer("scripted", ServiceConfig(), services=[NAME], load=load)
    with pytest.raises(StartError, match="no such folder"):
        await failed.__aenter__()
    async with running(one, port=failed.port) as server:
        assert await generate(server.address) == ["hello"]


async def test_a_health_port_of_its_own_serves_nothing_else():
    async with running(one, health_port=0) as server:
        address = f"127.0.0.1:{server.health_port}"
        assert await health(address) == SERVING
        assert (await failure(address)).code() == StatusCode.UNIMPLEMENTED


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    options = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    command = ["openssl", *options.split(), "-addext", names, "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


async def test_tls_serves_those_who_trust_it_and_nobody_in_plain_text(certificate):
    cert, key = certificate
    async with running(one, tls_cert=cert, tls_key=key) as server:
        credentials = grpc.ssl_channel_credentials(cert.read_bytes())
        async with grpc.aio.secure_channel(server.address, credentials) as channel:
            call = generator_pb2_grpc.GeneratorServiceStub(channel).Generate(
                generator_pb2.GenerateRequest(), timeout=10
            )
            assert [response.completion.text async for response in call] == ["hello"]
        assert (await failure(server.address, timeout=2)).code() == StatusCode.UNAVAILABLE


async def test_mutual_tls_refuses_a_client_without_a_certificate(certificate):
    cert, key = certificate
    roles = AuthConfig(certificates={"localhost": ("generate",)})
    async with running(one, tls_cert=cert, tls_key=key, tls_client_ca=cert, auth=roles) as server:
        for own, expected in [((key.read_bytes(), cert.read_bytes()), None), ((None, None), StatusCode.UNAVAILABLE)]:
            credentials = grpc.ssl_channel_credentials(cert.read_bytes(), *own)
            async with grpc.aio.secure_channel(server.address, credentials) as channel:
                stub = generator_pb2_grpc.GeneratorServiceStub(channel)
                call = stub.Generate(generator_pb2.GenerateRequest(), timeout=5)
                if expected is None:
                    await call.read()
                else:
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await call.read()
                    assert caught.value.code() == expected


@pytest.mark.parametrize("content", [None, b"not a certificate"])
async def test_an_unusable_certificate_is_named_at_start(tmp_path, certificate, content):
    bad = tmp_path / "bad.pem"
    if content is not None:
        bad.write_bytes(content)
    with pytest.raises(StartError, match=r"^tls_cert: .*bad\.pem"):
        await running(one, tls_cert=bad, tls_key=certificate[1]).start()
