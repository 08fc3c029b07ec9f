"""The reference samples over which a reward model's score gets mean 0 and deviation 1 (ALGORITHMS 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np

from trimtab.models.scalar_head import ScalarModel
from trimtab.trainer.context import StageContext
from trimtab.trainer.data import (
    TokenizedRanking,
    load_demonstrations,
    load_prompts,
    tokenize_demonstrations,
    tokenize_prompts,
)
from trimtab.trainer.loop_thread import LoopThread
from trimtab.trainer.patience import Patience
from trimtab.trainer.ppo.prompts import completion_seed
from trimtab.trainer.run import RunFailedError
from trimtab.trainer.stages import RewardModelConfig
from trimtab_client import AsyncGeneratorClient, ChannelOptions, Sampling


def normalization_sequences(
    config: RewardModelConfig, model: ScalarModel, train: Sequence[TokenizedRanking], context: StageContext
) -> list[np.ndarray]:
    """The generator's answers, demonstrations, or the rankings' responses, each with its prompt.

    Raises RunFailedError where the generator has another tokenizer or stays away, StopRun.
    """
    if not config.normalization_data:
        return [sequence.token_ids_T for ranking in train for sequence in ranking.sequences]
    elif config.generator_address:
        context.run.doing("sampling answers to measure the score's mean and deviation on")
        prompts = tokenize_prompts(load_prompts(config.normalization_data), model.tokenizer, model.max_length - 1)
        work = _answers(config, model.tokenizer_digest, prompts, context.run.hindered, context.services)
        with closing(LoopThread("normalization")) as loop:
            return context.run.wait(loop.submit(work))
    else:
        eos = model.eos_token_ids[0] if model.eos_token_ids else None
        rows = load_demonstrations(config.normalization_data)
        tokenized = tokenize_demonstrations(rows, model.tokenizer, model.max_length, eos_token_id=eos)
        return [row.token_ids_T for row in tokenized]


async def _answers(
    config: RewardModelConfig,
    tokenizer_digest: str,
    prompts: Sequence[np.ndarray],
    say: Callable[[str, str], None],
    services: ChannelOptions,
) -> list[np.ndarray]:
    """One sampled answer to each prompt, behind it. A generator that is away is waited for; what has come is kept."""
    service = f"generator at {config.generator_address}"
    patience = Patience(config.service_timeout_s, say)
    sampling = Sampling(max_tokens=config.normalization_max_tokens)
    answers: dict[int, np.ndarray] = {}
    options = replace(services, timeout_s=config.service_timeout_s)
    async with AsyncGeneratorClient(config.generator_address, options) as generator:

        async def ask() -> None:
            lacking = [index for index in range(len(prompts)) if index not in answers]
            stream = generator.generate(
                [prompts[index].tolist() for index in lacking],
                sampling=sampling,
                seeds=[[completion_seed(config.stage.seed, 0, index, 0)] for index in lacking],
            )
            async for completion in stream:
                whole = np.concatenate([completion.prompt_token_ids, completion.token_ids])
                answers[lacking[completion.prompt_index]] = whole

        if (await patience.until_answered(service, generator.get_model)).tokenizer_digest != tokenizer_digest:
            raise RunFailedError("generator_address: its tokenizer is not the reward model's")
        await patience.until_answered(service, ask, lambda: len(answers))
    return [answers[index] for index in range(len(prompts))]
