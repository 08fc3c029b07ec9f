"""A reward service of a few lines on the runtime, which starts in a second: `small_reward.py CONFIG`.

Its score is the length of the response, told after a tenth of a second; it has no batches and no model.
"""

import asyncio
import sys
from collections.abc import Sequence

import grpc.aio

from trimtab.runtime.config import ServiceConfig, load_config
from trimtab.runtime.server import ServerContext, Service, serve
from trimtab_client.ragged import encode_floats
from trimtab_client.v1 import model_pb2, model_pb2_grpc, reward_pb2, reward_pb2_grpc

NAME, MODEL = "trimtab.v1.RewardService", "trimtab.v1.ModelService"


class Lengths(reward_pb2_grpc.RewardServiceServicer):
    async def Score(
        self, request: reward_pb2.ScoreRequest, context: grpc.aio.ServicerContext
    ) -> reward_pb2.ScoreResponse:
        await asyncio.sleep(0.1)
        scores = encode_floats([len(item.response) for item in request.texts.items])
        return reward_pb2.ScoreResponse(scores=scores, normalized_scores=scores)


class NoModel(model_pb2_grpc.ModelServiceServicer):
    async def GetModel(
        self, request: model_pb2.GetModelRequest, context: grpc.aio.ServicerContext
    ) -> model_pb2.GetModelResponse:
        return model_pb2.GetModelResponse(model=model_pb2.ModelInfo(max_sequences=512, max_tokens=65536))


async def load(context: ServerContext) -> Sequence[Service]:
    return [
        Service(NAME, reward_pb2_grpc.add_RewardServiceServicer_to_server, Lengths()),
        Service(MODEL, model_pb2_grpc.add_ModelServiceServicer_to_server, NoModel()),
    ]


if __name__ == "__main__":
    sys.exit(serve("reward", load_config(ServiceConfig, sys.argv[1]), services=[NAME, MODEL], load=load))
