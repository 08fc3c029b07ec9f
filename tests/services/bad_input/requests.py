"""Good requests of every RPC, for `mutations` to spoil. An RPC without one here is sent its empty message."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from tests.services.every_method import services
from trimtab.gateway.oip_v2 import open_inference_grpc_pb2 as inference_pb2
from trimtab_client.ragged import RaggedTokens, encode_ids
from trimtab_client.v1 import generator_pb2, model_pb2, reference_pb2, reward_pb2, tokens_pb2, trainer_pb2

SERVERS = {
    "trimtab.v1.GeneratorService": ("generator",),
    "trimtab.v1.RewardService": ("reward",),
    "trimtab.v1.ReferenceService": ("reference",),
    "trimtab.v1.TrainerService": ("trainer",),
    "trimtab.v1.ModelService": ("generator", "reward", "reference"),
    "inference.GRPCInferenceService": ("gateway",),
}


@dataclass(frozen=True)
class Target:
    """One RPC at one server, with good requests of it."""

    server: str
    path: str
    streams: bool
    requests: tuple[Message, ...]


def targets(digest: str) -> list[Target]:
    """Every RPC of every service, at every server that has it; `digest` is the tiny models' tokenizer's."""
    good = good_requests(digest)
    found = []
    for name, (descriptor, _) in services().items():
        for method in descriptor.methods:
            path = f"/{name}/{method.name}"
            requests = good.get(path) or (GetMessageClass(method.input_type)(),)
            found += [Target(server, path, method.server_streaming, requests) for server in SERVERS[name]]
    return found


def good_requests(digest: str) -> dict[str, tuple[Message, ...]]:
    """By method path."""
    ragged = RaggedTokens.from_sequences([[0, 5, 9], [0, 7, 8, 9]], prompt_lengths=[1, 2]).to_proto()
    pin = model_pb2.VersionPin(exact=model_pb2.ModelVersion(name="x"))
    chat = tokens_pb2.Conversation(
        messages=[
            tokens_pb2.ChatMessage(role="user", content="w1 w2"),
            tokens_pb2.ChatMessage(role="assistant", content="w3"),
        ]
    )
    pairs = reward_pb2.TextBatch(items=[reward_pb2.TextPair(prompt="w1", response="w2", reference="w2")])
    tokens = reward_pb2.TokenBatch(tokens=ragged, tokenizer_digest=digest)
    conversations = reward_pb2.ConversationBatch(conversations=[chat], references=["w3"])
    scores = [
        reward_pb2.ScoreRequest(scorer=scorer, **form)
        for scorer in ("", "words", "digits", "exact", "blend")
        for form in ({"texts": pairs}, {"tokens": tokens}, {"conversations": conversations})
    ]
    scores.append(reward_pb2.ScoreRequest(tokens=tokens, version=pin, truncate=True, deterministic=True))
    sampling = generator_pb2.SamplingParameters(n=2, max_tokens=3, temperature=0.7, stop=["w9"], seed=3)
    prompts = [
        generator_pb2.Prompt(token_ids=encode_ids([0, 4, 5]), seeds=[1, 2]),
        generator_pb2.Prompt(text="w1 w2"),
        generator_pb2.Prompt(chat=chat),
    ]
    stage = trainer_pb2.StageConfig(
        model="nowhere", max_length=32, seed=1, optimizer=trainer_pb2.OptimizerConfig(learning_rate=1e-3)
    )
    sft = trainer_pb2.SftConfig(stage=stage, data="nowhere.jsonl", epochs=1, batch_size=2)
    rewards = trainer_pb2.RewardModelConfig(stage=stage, data="nowhere.jsonl", batch_prompts=2)
    ppo = trainer_pb2.PpoConfig(stage=stage, prompts="nowhere.jsonl", steps=2, batch_size=4, minibatch_size=2)
    version = model_pb2.ModelVersion(run_id="rm", name="reward", step=1)
    run, inference = "/trimtab.v1.TrainerService/", "/inference.GRPCInferenceService/"
    return {
        "/trimtab.v1.RewardService/Score": tuple(scores),
        "/trimtab.v1.GeneratorService/Generate": (
            generator_pb2.GenerateRequest(prompts=prompts, sampling=sampling),
            generator_pb2.GenerateRequest(prompts=prompts[1:2], sampling=sampling, version=pin),
        ),
        "/trimtab.v1.ReferenceService/LogProbs": (
            reference_pb2.LogProbsRequest(
                tokens=ragged, tokenizer_digest=digest, temperature=0.7, include_lse=True, include_hidden=True
            ),
        ),
        f"{inference}ModelReady": (inference_pb2.ModelReadyRequest(name="reward"),),
        f"{inference}ModelMetadata": (inference_pb2.ModelMetadataRequest(name="reward:words"),),
        f"{inference}ModelInfer": tuple(_inferences()),
        "/trimtab.v1.ModelService/LoadVersion": (model_pb2.LoadVersionRequest(version=version),),
        f"{run}Start": (
            trainer_pb2.StartRequest(run_id="run-a", sft=sft),
            trainer_pb2.StartRequest(run_id="run-b", reward_model=rewards),
            trainer_pb2.StartRequest(run_id="run-c", ppo=ppo),
        ),
        f"{run}Status": (trainer_pb2.StatusRequest(run_id="run-a"),),
        f"{run}Watch": (trainer_pb2.WatchRequest(run_id="run-a", after_step=0),),
        f"{run}Samples": (trainer_pb2.SamplesRequest(run_id="run-a", step=1, watched=True),),
        f"{run}Pause": (trainer_pb2.PauseRequest(run_id="run-a"),),
        f"{run}Resume": (trainer_pb2.ResumeRequest(run_id="run-a"),),
        f"{run}Checkpoint": (trainer_pb2.CheckpointRequest(run_id="run-a"),),
        f"{run}Stop": (trainer_pb2.StopRequest(run_id="run-a"),),
    }


def _inferences() -> Iterator[Message]:
    """Of the Open Inference Protocol: texts in either of its two places, and every scorer."""
    Tensor = inference_pb2.ModelInferRequest.InferInputTensor
    Output = inference_pb2.ModelInferRequest.InferRequestedOutputTensor
    columns = {"prompt": [b"w1", b"w2 w3"], "response": [b"w4", b"w5"], "reference": [b"w4", b"w6"]}
    for scorer in ("reward", "reward:words", "reward:exact", "reward:blend"):
        yield inference_pb2.ModelInferRequest(
            model_name=scorer,
            id="one",
            inputs=[
                Tensor(
                    name=name,
                    datatype="BYTES",
                    shape=[2],
                    contents=inference_pb2.InferTensorContents(bytes_contents=values),
                )
                for name, values in columns.items()
            ],
            outputs=[Output(name="score")],
            parameters={"truncate": inference_pb2.InferParameter(bool_param=True)},
        )
    yield inference_pb2.ModelInferRequest(
        model_name="reward",
        inputs=[Tensor(name="text", datatype="BYTES", shape=[2, 1])],
        raw_input_contents=[b"\2\0\0\0w1\2\0\0\0w2"],
    )
