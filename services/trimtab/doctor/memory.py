"""How much memory a recipe needs, reckoned from shapes: docs/doctor.md has the formulas, their sources and how far they
were off where they were measured.

All numbers are bytes of one process (of one rank where a trainer has several). Letters as there: P parameters, c bytes
of the compute dtype, N tokens of a micro-batch, L layers, h hidden, a width of all heads, i of the MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from trimtab.doctor.shapes import MLP_KEPT, ModelShape
from trimtab.kernels.chunked_torch import CHUNK_BYTES
from trimtab.models.attention import SHORT_ON_CPU
from trimtab.models.llama_weights import FAMILY
from trimtab.trainer.stages import PpoConfig, RewardModelConfig, SftConfig, Stage

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GPU_SCRATCH_BYTES = 1 << 30
"""`kernels.triton_ppo.SCRATCH_BYTES`, which cannot be imported where there is no Triton."""
COMPILED_KERNELS_BYTES = 20 << 20
"""Of oneDNN on a CPU that multiplies bfloat16 in hardware: a kernel for every shape. Measured: 17 to 19 MB."""
CACHE_COLUMNS = 64
"""The KV cache keeps half its longest sequence as room to grow, in columns of so many."""


@dataclass(frozen=True)
class Need:
    """What one process keeps in the memory of its device, by what it is for, bytes."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Setting:
    """How a model trains.

    Attributes:
        compute_bytes: c, of a weight in the forward pass.
        tokens: N, of a micro-batch.
        longest: tokens of the longest sequence.
        ranks: processes over which FSDP2 shards what the model keeps.
        logits: matrices of logits that the head works with at once on a CPU.
    """

    compute_bytes: int
    tokens: int
    longest: int
    checkpointing: bool
    on_cpu: bool
    ranks: int = 1
    logits: int = 2


def layer_activation_bytes(shape: ModelShape, compute_bytes: int, *, longest: int, on_cpu: bool) -> int:
    """What one block keeps of one token for its backward pass.

    Of width h: the normalised input and the output of two norms; of width a: queries, keys and values (repeated for
    their group of queries) and attention's output in two layouts; of width i: `mlp_kept`; the rotation's sine and, in
    float32, two norms' statistics and the log-sum-exp of each head. A CPU is taken for one that multiplies short
    sequences' scores out; one that fuses their attention (models/cpu.py) keeps less.
    """
    h, a, i = shape.hidden, shape.attention_width, shape.intermediate
    attention, statistics = 5 * a + shape.head_dim, 4 * shape.heads + 8
    if on_cpu and longest <= SHORT_ON_CPU:  # plain matrix products: the weights instead of the log-sum-exp
        attention, statistics = 4 * a + shape.head_dim + shape.heads * longest, 8
    if shape.query_key_norms:
        attention += (shape.heads + shape.kv_heads) * shape.head_dim
        statistics += 4 * (shape.heads + shape.kv_heads)
    return compute_bytes * (4 * h + attention + shape.mlp_kept * i) + statistics


def activation_bytes(shape: ModelShape, setting: Setting) -> int:
    """Of a forward and backward pass of a micro-batch: what is kept, and what the backward pass of a block works with.

    With checkpointing each block keeps its input, and one block at a time has all of it.
    """
    c, h = setting.compute_bytes, shape.hidden
    layer = layer_activation_bytes(shape, c, longest=setting.longest, on_cpu=setting.on_cpu)
    blocks = shape.layers * c * h + layer if setting.checkpointing else shape.layers * layer
    working = c * (2 * h + 3 * shape.intermediate)
    return setting.tokens * (blocks + 4 * c * h + working)


def head_bytes(shape: ModelShape, setting: Setting) -> int:
    """Of the fused head: the float32 gradient of its weight and the scratch for rows of logits, never all of them.

    On a CPU it computes in float32: a smaller weight is copied to it, its gradient rounded from it.
    """
    weight = 4 * shape.head_parameters
    if setting.on_cpu:
        cast = weight + setting.compute_bytes * shape.head_parameters if setting.compute_bytes < 4 else 0
        return weight + cast + setting.logits * min(CHUNK_BYTES, 4 * setting.tokens * shape.vocabulary)
    return weight + min(GPU_SCRATCH_BYTES, 2 * setting.tokens * shape.vocabulary)


def trained_model(shape: ModelShape, setting: Setting, *, scalar: bool = False, average: bool = False) -> Need:
    """A model that AdamW trains: ZeRO's 16 to 18 bytes a parameter (arXiv:1910.02054, section 3.1), sharded over ranks,
    and for a micro-batch what is larger: its activations, or its gradients in the compute dtype.

    On a CPU the gradient of embeddings that are no head too holds the rows that were read until the step makes it whole
    (trainer/optimizer.py), after the activations.
    """
    parameters = shape.scalar_parameters if scalar else shape.parameters
    c, shard = setting.compute_bytes, -(-parameters // setting.ranks)
    # With several ranks shards are float32 weights themselves, gathered in the compute dtype when they are used.
    alone = setting.ranks == 1
    late = 4 * shape.head_parameters if alone and setting.on_cpu and (scalar or not shape.tied) else 0
    parts = {
        "weights": c * shard if alone else 0,
        "master weights": 0 if alone and c == 4 else 4 * shard,
        "optimizer": 8 * shard,
        "gradients": 4 * shard - late,
        "average": (4 + c) * shard if average else 0,
    }
    activations = activation_bytes(shape, setting) + (0 if scalar else head_bytes(shape, setting))
    parts["activations"] = max(activations, late, c * shard if alone and c < 4 else 0)
    if not alone:  # a block and the next one, the embeddings and the head, each whole, with gradients on their way
        roots = shape.head_parameters * (1 if shape.tied or scalar else 2)
        parts["gathered"] = (3 * c + 4) * shape.block_parameters + (2 * c + 4) * roots
    return Need({name: size for name, size in parts.items() if size})


def adapter_parameters(shape: ModelShape, rank: int, *, scalar: bool = False) -> int:
    """Of LoRA's adapters, at most those of all linear layers of the body, and of a scalar head, which trains whole."""
    keys = shape.kv_heads * shape.head_dim
    attention = 2 * (shape.hidden + shape.attention_width) + 2 * (shape.hidden + keys)
    mlp = (3 if shape.gated else 2) * (shape.hidden + shape.intermediate)
    return shape.layers * rank * (attention + mlp) + (shape.hidden if scalar else 0)


def adapted_model(
    shape: ModelShape, setting: Setting, rank: int, *, scalar: bool = False, average: bool = False
) -> Need:
    """A model of which LoRA's adapters train, at most those of all linear layers of its body: frozen weights, AdamW's
    16 to 18 bytes for each of rank · (inputs + outputs), and what is larger: a micro-batch's activations, or the
    float32 weights that the frozen ones are rounded from while it is loaded.
    """
    c, parameters = setting.compute_bytes, shape.scalar_parameters if scalar else shape.parameters
    adapted = replace(shape, mlp_kept=MLP_KEPT) if shape.gated else shape  # an adapted MLP goes the model's own way
    trained = adapter_parameters(shape, rank, scalar=scalar)
    inside = setting.tokens * shape.layers * 14 * c * rank  # what A makes of the inputs of seven layers, and scaled
    head = 0 if scalar else head_bytes(shape, setting) - 4 * shape.head_parameters  # its weight has no gradient
    return Need(
        {
            "frozen weights": c * parameters,
            "adapters": (c if c == 4 else c + 4) * trained + 12 * trained,
            **({"average": (4 + c) * trained} if average else {}),
            "activations": max(activation_bytes(adapted, setting) + inside + head, (4 - c) * parameters),
        }
    )


def side_by_side(policy: Need, value: Need, *, on_cpu: bool) -> Need:
    """Two models in one trainer. On a CPU both work at once; else one after the other, so the larger pass counts."""
    passing = ("activations", "gathered")
    parts = {f"policy's {name}": size for name, size in policy.parts.items() if name not in passing}
    parts |= {f"value model's {name}": size for name, size in value.parts.items() if name not in passing}
    for name in passing:
        sizes = [need.parts.get(name, 0) for need in (policy, value)]
        if any(sizes):
            parts[name] = sum(sizes) if on_cpu else max(sizes)
    return Need(parts)


def trainer(
    stage: Stage,
    policy: ModelShape,
    value: ModelShape | None,
    *,
    on_cpu: bool,
    ranks: int = 1,
) -> Need:
    """One rank of the trainer of a stage; `value` is the value model of PPO with GAE."""
    need = _trained_models(stage, policy, value, on_cpu=on_cpu, ranks=ranks)
    if not on_cpu or DTYPE_BYTES[stage.stage.compute_dtype] == 4:
        return need
    return Need({**need.parts, "compiled kernels": COMPILED_KERNELS_BYTES})


def _trained_models(stage: Stage, policy: ModelShape, value: ModelShape | None, *, on_cpu: bool, ranks: int) -> Need:
    shared = stage.stage
    longest = min(shared.max_length, policy.max_length)
    batch = _sequences(stage) * longest
    setting = Setting(
        compute_bytes=DTYPE_BYTES[shared.compute_dtype],
        tokens=min(max(shared.micro_batch_tokens, longest), batch),
        longest=longest,
        checkpointing=shared.activation_checkpointing,
        on_cpu=on_cpu,
        ranks=ranks,
        logits=1 if isinstance(stage, PpoConfig) and _bare(stage) else 2,
    )
    if isinstance(stage, RewardModelConfig):
        return trained_model(policy, setting, scalar=True)
    average = isinstance(stage, PpoConfig) and stage.ema_decay is not None
    if stage.lora is not None:
        need = adapted_model(policy, setting, stage.lora.rank, average=average)
    else:
        need = trained_model(policy, setting, average=average)
    if isinstance(stage, SftConfig):
        return need
    if value is not None:
        lora = stage.value_lora
        second = adapted_model(value, setting, lora.rank, scalar=True) if lora else None
        need = side_by_side(need, second or trained_model(value, setting, scalar=True), on_cpu=on_cpu)
    if stage.exact_kl:
        need = Need({**need.parts, "reference's LM head": setting.compute_bytes * policy.head_parameters})
    return need


def _bare(stage: PpoConfig) -> bool:
    """Whether a step's head makes the PPO loss alone, in place of its logits; others need probabilities beside them."""
    return not (stage.entropy_coefficient or stage.exact_kl or stage.ptx_data)


def _sequences(stage: Stage) -> int:
    """Most sequences of one optimizer step."""
    if isinstance(stage, SftConfig):
        return stage.batch_size
    if isinstance(stage, PpoConfig):
        return stage.minibatch_size
    return stage.batch_prompts * 9


def generator(
    shape: ModelShape,
    *,
    dtype: str,
    slots: int,
    longest: int,
    prefill_tokens: int,
    on_cpu: bool = False,
    takes_versions: bool = False,
) -> Need:
    """The local engine: weights, the KV cache of its slots (vLLM, arXiv:2309.06180, section 3: 2·L·h_kv a token), the
    logits of a decode step in float32 with two copies of the sampler's, and a prefill's pass.

    On a CPU the Llama family's weights are there a second time, packed, and a new version stands beside the one that
    serves: read as float32 and then in the served dtype, or in that and packed, whichever is more.
    """
    c = DTYPE_BYTES[dtype]
    packed = packed_bytes(shape, dtype, on_cpu=on_cpu)
    packed += c * shape.head_parameters if packed else 0
    coming = max((4 + c) * shape.parameters, c * shape.parameters + packed) if on_cpu and takes_versions else 0
    per_token = 2 * shape.layers * shape.kv_heads * shape.head_dim * c
    columns = -(-(longest + max(CACHE_COLUMNS, longest // 2)) // CACHE_COLUMNS) * CACHE_COLUMNS
    return Need(
        {
            "weights": c * shape.parameters,
            **({"packed weights": packed} if packed else {}),
            **({"a new version": coming} if coming else {}),
            "KV cache": slots * columns * per_token,
            "logits": 3 * 4 * slots * shape.vocabulary,
            "activations": forward_bytes(shape, c, prefill_tokens),
        }
    )


def scorer(shape: ModelShape, *, dtype: str, batch_tokens: int, scalar: bool, on_cpu: bool = False) -> Need:
    """A reward or reference service: weights and one packed forward pass without gradients.

    A reward model of the Llama family has its layers' weights a second time on a CPU, packed.
    """
    c = DTYPE_BYTES[dtype]
    parameters = shape.scalar_parameters if scalar else shape.parameters
    packed = packed_bytes(shape, dtype, on_cpu=on_cpu) if scalar else 0
    return Need(
        {
            "weights": c * parameters,
            **({"packed weights": packed} if packed else {}),
            "activations": forward_bytes(shape, c, batch_tokens),
        }
    )


def packed_bytes(shape: ModelShape, dtype: str, *, on_cpu: bool) -> int:
    """The layers' weights as `models.llama` reads them; 0 where it does not run the model."""
    packs = on_cpu and shape.model_type in FAMILY and dtype != "float16"
    return DTYPE_BYTES[dtype] * shape.layers * shape.block_parameters if packs else 0


def forward_bytes(shape: ModelShape, compute_bytes: int, tokens: int) -> int:
    """A pass without gradients: the residual stream and the widest of a block's two halves."""
    widest = max(3 * shape.intermediate, 7 * shape.attention_width)
    return compute_bytes * tokens * (3 * shape.hidden + widest)
