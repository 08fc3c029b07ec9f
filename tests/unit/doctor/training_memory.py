"""Prints what the doctor reckons a PPO trainer's memory to be and what it really was: `… DTYPE CHECKPOINTING
ADAPTERS`.

Two JSON numbers of bytes: the estimate, and the most that the process held in a step beyond what it held before it had
a model. Run with malloc giving freed memory back at once, so that the process's size is what is in use.
"""

import gc
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from trimtab.doctor import memory, shapes
from trimtab.models.policy import Policy
from trimtab.trainer.adapters import attach_adapters
from trimtab.trainer.forward import prepare_for_training
from trimtab.trainer.optimizer import MasterWeightOptimizer, masters_of
from trimtab.trainer.ppo.experience import Episode, gather_experience
from trimtab.trainer.ppo.update import PpoUpdate
from trimtab.trainer.stages import OptimizerConfig, PpoConfig, parse_stage
from trimtab_client import Completion

TOKENIZER = Path(__file__).parents[3] / "examples" / "models" / "stories260K-hf"
EPISODES, LENGTH = 8, 300


def make_update(folder: str, stage: PpoConfig) -> PpoUpdate:
    policy = Policy.load(folder)
    if stage.lora is not None:
        attach_adapters(policy, stage.lora, 0, "lora")
    masters = masters_of(policy.model, stage.stage.compute_dtype)
    prepare_for_training(policy.model, activation_checkpointing=stage.stage.activation_checkpointing)
    optimizer = MasterWeightOptimizer(policy.model, OptimizerConfig(), masters)
    return PpoUpdate(stage, policy, optimizer, None, None, np.random.default_rng(0))


def step(update: PpoUpdate) -> None:
    random, half = np.random.default_rng(0), LENGTH // 2
    logprobs, made = np.full(half, -6.0, np.float32), []
    for index in range(EPISODES):
        prompt, response = (random.integers(3, 400, half).astype(np.int32) for _ in range(2))
        completion = Completion(index, 0, prompt, response, logprobs, "", "stop", (), index)
        made.append(Episode(completion, 0.0, float(random.normal()), logprobs))
    experience = gather_experience(made)
    epoch = update.plan_epoch(experience)
    update.optimize(experience, epoch, update.fix_targets(experience, epoch, 0.02), 1e-4, 1e-4)


def run(sizes: tuple[int, int, int, int], dtype: str, checkpointing: bool, adapters: bool) -> tuple[int, int]:
    hidden, intermediate, layers, vocabulary = sizes
    torch.manual_seed(0)
    shape = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=vocabulary, num_attention_heads=8, num_key_value_heads=4, **shape)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
        settings = {"compute_dtype": dtype, "activation_checkpointing": checkpointing, "micro_batch_tokens": 1200}
        values = {"prompts": "-", "batch_size": EPISODES, "minibatch_size": EPISODES, "advantage": "group"}
        values |= {"lora": {"rank": 16}} if adapters else {}
        shared = {"model": folder, "max_length": LENGTH, **settings}
        stage = parse_stage("ppo", {**values, "samples_per_prompt": 2, "stage": shared})
        assert isinstance(stage, PpoConfig)
        need = memory.trainer(stage, shapes.shape_of(folder, None), None, on_cpu=True)
        gc.collect()
        before = size_bytes("VmRSS")
        update = make_update(folder, stage)
        step(update)  # Adam has its moments from now on
        Path("/proc/self/clear_refs").write_text("5")
        step(update)
    return need.total, size_bytes("VmHWM") - before


def size_bytes(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    dtype, checkpointing, adapters = sys.argv[1], sys.argv[2] == "yes", sys.argv[3] == "yes"
    run((64, 128, 1, 512), dtype, checkpointing, adapters)  # the libraries' own memory
    print(json.dumps(run((256, 688, 6, 16_000), dtype, checkpointing, adapters)))
