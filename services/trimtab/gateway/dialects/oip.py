"""KServe's Open Inference Protocol v2 over gRPC, of the reward model: what Triton's and KServe's clients speak.

A model is one of the reward model's names, or NAME:SCORER. Its inputs are BYTES tensors of equal shape [B] or [B, 1]:
`prompt` and `response`, or `text` alone, and for verifiers `reference`. Its outputs are FP32 [B]: `score`, the bare
logit, and `normalized_score`. The parameter `truncate` cuts what is too long; a model version is a step.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

import grpc.aio
import numpy as np
from grpc import StatusCode

from trimtab import __version__
from trimtab.gateway.access import Gate
from trimtab.gateway.config import GatewayConfig
from trimtab.gateway.oip_v2 import open_inference_grpc_pb2 as pb
from trimtab.gateway.oip_v2 import open_inference_grpc_pb2_grpc as stubs
from trimtab.gateway.problems import Problem
from trimtab.gateway.upstreams import RewardModel, Upstreams
from trimtab.runtime.calls import CALLER
from trimtab.runtime.errors import ServiceError, exhausted, invalid, not_found
from trimtab_client import ModelInfo, ModelVersion, Scores, TrimtabError

SERVICE_NAME = "inference.GRPCInferenceService"
INPUTS = ("prompt", "response", "text", "reference")
OUTPUTS = ("score", "normalized_score")
READY_TIMEOUT_S = 5.0
_WORDS = (
    (re.compile(r"^texts\.items\[(\d+)\]\.(\w+)"), r"inputs.\2[\1]"),
    (re.compile(r"^texts\.items"), "inputs"),
    (re.compile(r"^version(\.\w+)*"), "model_version"),
    (re.compile(r"^scorer"), "model_name"),
)
"""The reward service's fields as they are called here: row 3 of the input `reference` is inputs.reference[3]."""


class OipServicer(stubs.GRPCInferenceServiceServicer):
    """inference.GRPCInferenceService."""

    def __init__(self, config: GatewayConfig, upstreams: Upstreams, gate: Gate) -> None:
        self._config = config
        self._upstreams = upstreams
        self._gate = gate

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Any) -> pb.ServerLiveResponse:
        """The gateway runs."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Any) -> pb.ServerReadyResponse:
        """The reward service answers."""
        self._count(context)
        return pb.ServerReadyResponse(ready=await self._ready(self._config.reward_names[0]))

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Any) -> pb.ServerMetadataResponse:
        """Who this is."""
        return pb.ServerMetadataResponse(name="trimtab", version=__version__)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Any) -> pb.ModelReadyResponse:
        """The model is known, its service answers, and it serves the version that was asked for."""
        self._count(context)
        return pb.ModelReadyResponse(ready=await self._ready(request.name, request.version))

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Any) -> pb.ModelMetadataResponse:
        """Inputs, outputs and the version that is served."""
        self._count(context)
        model = self._model(request.name, "name")
        try:
            info = await model.client.get_model(READY_TIMEOUT_S)
        except TrimtabError as error:
            raise _as_service_error(error) from error
        Tensor = pb.ModelMetadataResponse.TensorMetadata
        served = _version(info, model.scorer)
        if served is None:
            raise not_found(f"name: no model {request.name!r} here", field="name")
        if request.version not in ("", str(served.step)):
            raise not_found(f"version: {request.version!r} is not served, but {served.step}", field="version")
        return pb.ModelMetadataResponse(
            name=request.name,
            versions=[str(served.step)],
            platform="trimtab_reward",
            inputs=[Tensor(name=name, datatype="BYTES", shape=[-1]) for name in INPUTS],
            outputs=[Tensor(name=name, datatype="FP32", shape=[-1]) for name in OUTPUTS],
        )

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelInferResponse:
        """Score a batch."""
        self._count(context)
        model = self._model(request.model_name, "model_name")
        pairs, references = read_rows(request, self._config.max_rows)
        wanted = _wanted(request)
        left_s = context.time_remaining()
        timeout_s = self._config.timeout_s if left_s is None else min(left_s, self._config.max_timeout_s)
        try:
            found = await model.client.score_texts(
                pairs,
                _pin(request.model_version),
                _truncate(request),
                timeout_s,
                scorer=model.scorer,
                references=references,
            )
        except TrimtabError as error:
            raise _as_service_error(error) from error
        return _response(request, wanted, found)

    def _count(self, context: Any) -> None:
        """RESOURCE_EXHAUSTED where this caller asks too often, over HTTP and gRPC together."""
        try:
            self._gate.count(CALLER.get(), host_of(context.peer()))
        except Problem as problem:
            raise exhausted(problem.message, retry_after_s=problem.retry_after_s or 1.0) from None

    async def _ready(self, name: str, version: str = "") -> bool:
        try:
            model = self._model(name, "name")
            info = await model.client.get_model(READY_TIMEOUT_S)
        except (ServiceError, TrimtabError):
            return False
        served = _version(info, model.scorer)
        return served is not None and version in ("", str(served.step))

    def _model(self, name: str, field: str) -> RewardModel:
        try:
            return self._upstreams.reward(name, field)
        except Problem as problem:
            raise not_found(problem.message, field=field) from None


def host_of(peer: str) -> str:
    """The host in gRPC's name of a peer: "ipv4:10.0.0.1:4711", "ipv6:%5B::1%5D:4711"."""
    return unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]") or peer


def read_rows(request: pb.ModelInferRequest, most: int) -> tuple[list[tuple[str, str]], list[str] | None]:
    """The (prompt, response) pairs of a request and their references, if it has these; at most so many.

    ServiceError INVALID_ARGUMENT naming the input that is wrong.
    """
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise invalid("raw_input_contents", f"{len(raw)} tensors for {len(request.inputs)} inputs")
    columns: dict[str, list[str]] = {}
    for index, tensor in enumerate(request.inputs):
        field = f"inputs[{index}]"
        if tensor.name not in INPUTS:
            raise invalid(f"{field}.name", f"{tensor.name!r} is none of {', '.join(INPUTS)}")
        if tensor.name in columns:
            raise invalid(f"{field}.name", f"{tensor.name!r} comes twice")
        if raw and tensor.HasField("contents"):
            raise invalid(f"{field}.contents", "must be empty beside raw_input_contents")
        rows = _row_count(tensor, field, most)
        values = _unpacked(raw[index], index, rows) if raw else tensor.contents.bytes_contents
        if len(values) != rows:
            raise invalid(f"{field}.shape", f"says {rows}, but there are {len(values)} texts")
        columns[tensor.name] = _texts(field, values)
    references = columns.pop("reference", None)
    given = set(columns)
    if given == {"text"}:
        responses = columns["text"]
        prompts = [""] * len(responses)
    elif given == {"prompt", "response"}:
        prompts, responses = columns["prompt"], columns["response"]
    else:
        raise invalid("inputs", f"give prompt and response, or text alone; got {', '.join(sorted(given)) or 'nothing'}")
    if len(prompts) != len(responses):
        raise invalid("inputs", f"{len(prompts)} prompts for {len(responses)} responses")
    if references is not None and len(references) != len(responses):
        raise invalid("inputs", f"{len(references)} references for {len(responses)} responses")
    return list(zip(prompts, responses, strict=True)), references


def _row_count(tensor: pb.ModelInferRequest.InferInputTensor, field: str, most: int) -> int:
    """What its shape says, before anything of its content is looked at."""
    if tensor.datatype != "BYTES":
        raise invalid(f"{field}.datatype", f"{tensor.datatype!r}; texts are BYTES")
    shape = list(tensor.shape[:3])
    if not (len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)) or shape[0] < 1:
        raise invalid(f"{field}.shape", f"{shape} is neither [B] nor [B, 1] with B of at least 1")
    if shape[0] > most:
        raise invalid(f"{field}.shape", f"{shape[0]} rows, but a request may hold {most}")
    return shape[0]


def _texts(field: str, values: Sequence[bytes]) -> list[str]:
    try:
        return [value.decode("utf-8") for value in values]
    except UnicodeDecodeError:
        raise invalid(f"{field}.contents", "holds bytes that are not UTF-8") from None


def _unpacked(raw: bytes, index: int, rows: int) -> list[bytes]:
    """The elements of a raw BYTES tensor, each behind its length in four little-endian bytes; `rows` of them."""
    values: list[bytes] = []
    at = 0
    while at < len(raw):
        if len(values) == rows:
            raise invalid(f"raw_input_contents[{index}]", f"goes on behind the {rows} texts that the shape says")
        if at + 4 > len(raw):
            raise invalid(f"raw_input_contents[{index}]", "ends within a length")
        (size,) = struct.unpack_from("<I", raw, at)
        at += 4 + size
        if at > len(raw):
            raise invalid(f"raw_input_contents[{index}]", f"ends within an element of {size} bytes")
        values.append(raw[at - size : at])
    return values


def _version(info: ModelInfo, scorer: str) -> ModelVersion | None:
    """What a scorer ("": the default one) serves; None where there is none of that name."""
    if not scorer:
        return info.version
    return next((one.version for one in info.scorers if one.name == scorer), None)


def _wanted(request: pb.ModelInferRequest) -> list[str]:
    wanted: list[str] = []
    for index, output in enumerate(request.outputs):
        if output.name not in OUTPUTS:
            raise invalid(f"outputs[{index}].name", f"{output.name!r} is none of {', '.join(OUTPUTS)}")
        if output.name in wanted:
            raise invalid(f"outputs[{index}].name", f"{output.name!r} comes twice")
        wanted.append(output.name)
    return wanted or list(OUTPUTS)


def _pin(version: str) -> ModelVersion | None:
    if not version:
        return None
    if not (version.isascii() and version.isdecimal()) or len(version) > 18:
        raise invalid("model_version", f"{version!r} is no step")
    return ModelVersion("", "", int(version))


def _truncate(request: pb.ModelInferRequest) -> bool:
    if "truncate" not in request.parameters:
        return False
    value = request.parameters["truncate"]
    if value.WhichOneof("parameter_choice") != "bool_param":
        raise invalid("parameters.truncate", "is no bool")
    return value.bool_param


def _response(request: pb.ModelInferRequest, wanted: Sequence[str], found: Scores) -> pb.ModelInferResponse:
    values = {"score": found.scores, "normalized_score": found.normalized_scores}
    response = pb.ModelInferResponse(
        model_name=request.model_name, model_version=str(found.version.step), id=request.id
    )
    for name in wanted:
        output = response.outputs.add(name=name, datatype="FP32", shape=[len(values[name])])
        if request.raw_input_contents:  # the answer comes as the question came
            response.raw_output_contents.append(values[name].astype("<f4").tobytes())
        else:
            output.contents.fp32_contents.extend(np.asarray(values[name], dtype=np.float32).tolist())
    return response


def _as_service_error(error: TrimtabError) -> ServiceError:
    code = getattr(StatusCode, error.code, StatusCode.INTERNAL)
    field, message = error.field, error.message
    for own, callers in _WORDS:
        if field is not None and own.match(field):
            field = own.sub(callers, field)
            message = own.sub(callers, message) if own.match(message) else message
            break
    return ServiceError(code, message, field=field, retry_after_s=error.retry_after_s)
