"""A generator on vLLM takes its share of each of its GPUs, and on a CPU what it is told: the doctor counts that."""

import pytest
from transformers import LlamaConfig

from trimtab.doctor import vllm
from trimtab.doctor.devices import CPU, Device
from trimtab.doctor.placement import memory_findings
from trimtab.doctor.plan import Plan
from trimtab.doctor.shapes import shape_of
from trimtab.generator.config import GeneratorConfig
from trimtab.reference.config import ReferenceConfig

GIB = 1 << 30
SIZES = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(**SIZES, num_key_value_heads=3, head_dim=128, vocab_size=64_000, max_position_embeddings=4096)
    config.save_pretrained(folder)
    return str(folder)


def generator(model, device="cuda", **options):
    return GeneratorConfig(
        model=model, engine="vllm", device=device, dtype="bfloat16", max_slots=32, prefill_tokens=1024, vllm=options
    )


def examined(gpu_gib, *, gpus=1, **services):
    """{check: finding} for these services on GPUs of `gpu_gib`, all of it free."""
    size = int(gpu_gib * GIB)
    devices = {f"cuda:{number}": Device(f"cuda:{number}", size, size) for number in range(gpus)}
    devices[CPU] = Device(CPU, 64 * GIB)
    found = memory_findings(Plan(services=services), None, devices, "cuda:0", frozenset())
    return {finding.check: finding for finding in found}


def test_it_takes_its_share_of_the_whole_gpu_so_that_nothing_fits_beside_it(model):
    beside = ReferenceConfig(model=model, device="cuda", dtype="bfloat16")
    alone = examined(24, generator=generator(model))
    assert alone["memory of the generator"].detail.startswith("21.6 GiB on cuda:0: vLLM's share 21.6; it must hold")
    assert alone["the services on cuda:0"].state == "ok"
    both = examined(24, generator=generator(model), reference=beside)["the services on cuda:0"]
    assert both.state == "failed" and "vllm.gpu_memory_utilization" in both.fix
    shared = examined(24, generator=generator(model, gpu_memory_utilization=0.6), reference=beside)
    assert shared["the services on cuda:0"].state == "ok"


def test_alone_it_may_have_all_that_it_is_given(model):
    found = examined(24, generator=generator(model, gpu_memory_utilization=0.98))
    assert found["the services on cuda:0"].detail.startswith("23.5 of 24 GiB")
    assert found["the services on cuda:0"].state == "ok"


def test_each_gpu_of_two_holds_half_the_weights_and_two_of_three_heads(model):
    shape, config = shape_of(model, None), generator(model, tensor_parallel_size=2)
    need = vllm.least(config, shape).parts
    assert need["weights"] == shape.parameters  # 2 bytes each, over two GPUs
    assert need["KV cache"] == 2 * 8 * 2 * 128 * 2 * 4096
    assert need["logits"] == 3 * 4 * 32 * 64_000
    assert need["activations"] == 2 * (1024 + 32) * (3 * 2048 + 3 * 8192)


def test_a_model_too_large_for_one_gpu_fits_two_and_is_placed_on_both(model):
    one = examined(2.5, generator=generator(model))
    assert one["memory of the generator"].state == "failed"
    assert "tensor_parallel_size" in one["memory of the generator"].fix
    two = examined(2.5, gpus=2, generator=generator(model, tensor_parallel_size=2))
    assert two["memory of the generator"].state == "ok"
    assert two["the services on cuda:0"].detail.startswith("2.25 of")
    assert two["the services on cuda:1"].detail.startswith("2.25 of")
    lacking = examined(2.5, generator=generator(model, tensor_parallel_size=2))
    assert lacking["the services on cuda:1"].detail.startswith("there is no cuda:1")


def test_a_cache_of_a_given_size_counts_where_it_goes_beyond_the_share(model):
    found = examined(24, generator=generator(model, kv_cache_gib=30))
    assert found["the services on cuda:0"].state == "failed"
    assert "KV cache 30" in found["memory of the generator"].detail


@pytest.mark.parametrize(("options", "cache_gib"), [({}, 2), ({"kv_cache_gib": 5}, 5)])
def test_on_a_cpu_weights_count_for_vllm_the_policy_and_a_new_version_and_the_cache_as_it_is_set(
    model, tmp_path, options, cache_gib
):
    config, parameters = generator(model, CPU, **options), shape_of(model, None).parameters
    need = vllm.on_cpu(config, shape_of(model, None)).parts
    assert need["weights"] == need["policy beside it"] == need["a new version"] == 2 * parameters
    assert need["KV cache"] == cache_gib * GIB
    stored = vllm.on_cpu(config.model_copy(update={"store": str(tmp_path)}), shape_of(model, None)).parts
    assert stored["a new version"] == (4 + 2) * parameters
    assert examined(24, generator=config)["the services on cpu"].state == "ok"
