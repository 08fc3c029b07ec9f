"""The typed config of each training stage: what `TrainerService.Start` takes, checked before anything is loaded.

Field names are those of protos/trimtab/v1/trainer.proto; defaults are InstructGPT's (arXiv:2203.02155,
appendix C) where it gives one.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from google.protobuf import json_format
from google.protobuf.message import Message
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class StageConfigError(ValueError):
    """A stage config that cannot run; `field` is its dotted path."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class OptimizerConfig(_Config):
    """AdamW and its schedule; warm-up starts at a tenth of the rate."""

    learning_rate: Positive = 9.65e-6
    beta1: Share = 0.9
    beta2: Share = 0.95
    eps: Positive = 1e-5
    weight_decay: NonNegative = 0.0
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    max_grad_norm: Positive = 1.0


class StageConfig(_Config):
    """What the three stages share."""

    model: Annotated[str, Field(min_length=1)]
    seed: Annotated[int, Field(ge=0, lt=1 << 64)] = 0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    micro_batch_tokens: Count = 8192
    activation_checkpointing: bool = False
    optimizer: OptimizerConfig = OptimizerConfig()
    max_length: Annotated[int, Field(ge=2)] = 2048
    checkpoint_every_steps: Count = 20


class LoraConfig(_Config):
    """Low-rank adapters (arXiv:2106.09685): W + alpha / rank · B A, of which B and A train and W stays.

    Attributes:
        dropout: of the adapters' inputs while SFT trains.
        target_modules: names, or ends of names, of linear layers in the model's body; none: all of them.
    """

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    alpha: Positive = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: tuple[Annotated[str, Field(min_length=1)], ...] = ()


Publish = Literal["merged", "adapter"]
"""Whole models, or adapters alone on a base version that is in the store."""


class SftConfig(_Config):
    """Supervised fine-tuning on demonstrations."""

    stage: StageConfig
    data: Annotated[str, Field(min_length=1)]
    validation_data: str = ""
    epochs: Count = 16
    batch_size: Count = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    evaluate_every_steps: Count = 100
    lora: LoraConfig | None = None
    publish: Publish = "merged"

    @field_validator("publish")
    @classmethod
    def _has_adapters(cls, publish: Publish, others: ValidationInfo) -> Publish:
        return _adapters_only_with_lora(publish, others)

    @field_validator("dropout", "lora")
    @classmethod
    def _drops_the_same(cls, value: float | LoraConfig | None, others: ValidationInfo) -> float | LoraConfig | None:
        stage, drops = others.data.get("stage"), value.dropout if isinstance(value, LoraConfig) else value
        if drops and stage is not None and stage.activation_checkpointing:
            raise ValueError("dropout needs activation_checkpointing: false (a layer computed anew drops other inputs)")
        return value


class RewardModelConfig(_Config):
    """A reward model from rankings.

    Attributes:
        service_timeout_s: how long the generator of the normalization's responses is waited for without progress.
    """

    stage: StageConfig
    data: Annotated[str, Field(min_length=1)]
    validation_data: str = ""
    epochs: Count = 1
    batch_prompts: Annotated[int, Field(ge=1, le=64)] = 64
    evaluate_every_steps: Count = 100
    normalization_data: str = ""
    generator_address: str = ""
    normalization_max_tokens: Count = 128
    service_timeout_s: Positive = 600.0


def _adapters_only_with_lora(publish: Publish, others: ValidationInfo) -> Publish:
    if publish == "adapter" and others.data.get("lora", True) is None:
        raise ValueError("there are no adapters without lora; set lora, or publish: merged")
    return publish


class PpoConfig(_Config):
    """PPO against a reward service, a reference service and a generator service.

    Attributes:
        kl: one choice, as the loss includes the metric. "sampled" takes KL from the log-probs of sampled tokens alone;
            "exact_metric" reports it over the whole vocabulary too, from the reference's hidden states and LM head;
            "exact_loss" also adds `kl_loss_coefficient` times its mean over response tokens to the policy's loss. The
            penalty in the reward (`kl_coefficient`) is sampled k1 with any of them.
        old_logprobs: of a ratio. "trainer" computes them with its weights when an update starts, and weights each token
            by how far the generator's were off (decoupled PPO, arXiv:2110.00641); "generator" takes the generator's:
            a forward pass less, its numerics in the ratio, and entropy estimated by −log-prob of the sampled tokens.
        max_staleness: most versions between the one that samples a completion and the one it trains.
        advantage: "gae" with a value model; "group" is RLOO's mean of the prompt's other samples; "grpo" is less the
            mean of all its samples, over their deviation.
        ema_decay: of the policy's moving average, a step; InstructGPT's is 0.992.
        ptx_coefficient: InstructGPT's, of the mean NLL a token of `ptx_data`.
        gold_scorer: another scorer of the reward service, asked about every response and never trained on.
        lora, value_lora: train adapters of the policy; of the value model adapters and the head.
    """

    stage: StageConfig
    prompts: Annotated[str, Field(min_length=1)]
    value_model: str = ""
    generator_address: Annotated[str, Field(min_length=1)] = "127.0.0.1:7101"
    reward_address: Annotated[str, Field(min_length=1)] = "127.0.0.1:7102"
    reference_address: Annotated[str, Field(min_length=1)] = "127.0.0.1:7103"
    steps: Count = 500
    batch_size: Count = 512
    minibatch_size: Count = 64
    inner_epochs: Count = 1
    samples_per_prompt: Count = 1
    max_new_tokens: Count = 128
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    temperature: Positive = 1.0
    ignore_eos: bool = False
    kl_coefficient: NonNegative = 0.02
    kl: Literal["sampled", "exact_metric", "exact_loss"] = "sampled"
    kl_loss_coefficient: Annotated[NonNegative, Field(validate_default=True)] = 0.0
    adaptive_kl_target: Positive | None = None
    adaptive_kl_horizon: Positive = 10_000
    gamma: Share = 1.0
    gae_lambda: Share = 0.95
    advantage: Literal["gae", "group", "grpo"] = "gae"
    clip_range: Positive = 0.2
    value_clip_range: Positive = 0.2
    value_coefficient: NonNegative = 0.1
    entropy_coefficient: NonNegative = 0.0
    whiten_rewards: bool = False
    no_eos_score: Annotated[float, Field(allow_inf_nan=False)] | None = None
    target_approx_kl: Positive | None = None
    old_logprobs: Literal["trainer", "generator"] = "trainer"
    importance_weight_cap: Positive = 2.0
    publish_every_steps: Count = 1
    value_optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=9e-6, beta2=0.999, schedule="constant", warmup_steps=10
    )
    value_warmup_steps: Annotated[int, Field(ge=0)] = 0
    score_text: bool = False
    reward_scorer: str = ""
    gold_scorer: str = ""
    max_staleness: Annotated[int, Field(ge=0, le=16)] = 0
    service_timeout_s: Positive = 600.0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    ptx_data: str = ""
    ptx_coefficient: Positive = 27.8
    ptx_batch_size: Count | None = None
    lora: LoraConfig | None = None
    value_lora: LoraConfig | None = None
    publish: Publish = "merged"

    @property
    def least_versions(self) -> int:
        """Newest versions that the store must keep: a replay asks for the batch in flight from the version of the first
        time, `max_staleness` steps before the newest, or one more if the kill came between publishing and asking."""
        return self.max_staleness + 2

    @field_validator("publish")
    @classmethod
    def _has_adapters(cls, publish: Publish, others: ValidationInfo) -> Publish:
        return _adapters_only_with_lora(publish, others)

    @field_validator("lora", "value_lora")
    @classmethod
    def _drops_nothing(cls, lora: LoraConfig | None) -> LoraConfig | None:
        if lora is not None and lora.dropout:
            raise ValueError("dropout must be 0 in PPO: its ratios are those of the policy that sampled")
        return lora

    @field_validator("kl_loss_coefficient")
    @classmethod
    def _belongs_to_the_exact_loss(cls, coefficient: float, others: ValidationInfo) -> float:
        kl = others.data.get("kl")  # absent where it is wrong itself
        if kl == "exact_loss" and coefficient == 0:
            raise ValueError("kl: exact_loss needs a coefficient above 0")
        if kl in ("sampled", "exact_metric") and coefficient > 0:
            raise ValueError(f"there is no KL in the loss with kl: {kl}; set kl: exact_loss")
        return coefficient

    @field_validator("old_logprobs")
    @classmethod
    def _exact_kl_needs_the_pass(cls, source: str, others: ValidationInfo) -> str:
        kl = others.data.get("kl")
        if source == "generator" and kl in ("exact_metric", "exact_loss"):
            raise ValueError(f"kl: {kl} is measured in the pass that 'generator' spares; leave it at 'trainer'")
        return source

    @property
    def exact_kl(self) -> bool:
        """Whether the reference's hidden states are asked for."""
        return self.kl != "sampled"

    @model_validator(mode="after")
    def _fits(self) -> PpoConfig:
        if self.minibatch_size > self.batch_size or self.batch_size % self.minibatch_size:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of minibatch_size {self.minibatch_size}")
        if self.batch_size % self.samples_per_prompt:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of samples_per_prompt {self.samples_per_prompt}"
            )
        if self.advantage != "gae" and self.samples_per_prompt < 2:
            raise ValueError(f"advantage '{self.advantage}' needs samples_per_prompt of at least 2")
        if self.advantage != "gae" and self.value_warmup_steps:
            raise ValueError(f"value_warmup_steps: advantage '{self.advantage}' has no value model to warm up")
        if self.advantage != "gae" and self.value_lora is not None:
            raise ValueError(f"value_lora: advantage '{self.advantage}' has no value model")
        if self.gold_scorer and self.gold_scorer == self.reward_scorer:
            raise ValueError("gold_scorer: it judges what is trained on reward_scorer, so it must be another one")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError("min_new_tokens is above max_new_tokens")
        if self.publish_every_steps != 1:
            raise ValueError("publish_every_steps must be 1: max_staleness says how far rollouts may lag behind")
        return self


Stage = SftConfig | RewardModelConfig | PpoConfig
_CLASSES: dict[str, type[SftConfig | RewardModelConfig | PpoConfig]] = {
    "sft": SftConfig,
    "reward_model": RewardModelConfig,
    "ppo": PpoConfig,
}
PPO_OPTIMIZER: dict[str, Any] = {"learning_rate": 3e-6, "beta2": 0.999, "schedule": "constant", "warmup_steps": 10}
REWARD_OPTIMIZER: dict[str, Any] = {"learning_rate": 9e-6}


def parse_stage(kind: str, values: dict[str, Any]) -> Stage:
    """Validate a stage's values; StageConfigError names the first bad field.

    The policy optimizer's defaults differ by stage: 9.65e-6 (SFT), 9e-6 (reward model), 3e-6 constant (PPO).
    """
    presets = {"ppo": PPO_OPTIMIZER, "reward_model": REWARD_OPTIMIZER}.get(kind, {})
    values = dict(values)
    if isinstance(values.get("stage"), dict):
        stage = dict(values["stage"])
        stage["optimizer"] = presets | dict(stage.get("optimizer") or {})
        values["stage"] = stage
    try:
        return _CLASSES[kind].model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise StageConfigError(".".join(map(str, first["loc"])) or kind, first["msg"]) from error


def stage_from_proto(kind: str, message: Message) -> Stage:
    """Validate the config of a Start request; 64-bit numbers arrive as text in JSON and are read as such."""
    return parse_stage(kind, json_format.MessageToDict(message, preserving_proto_field_name=True))
