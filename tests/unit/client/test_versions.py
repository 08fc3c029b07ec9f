"""Versions, pins and seeds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.generator.local.philox import derive_seed as seed_of_the_generator
from trimtab_client import AtLeast, ModelVersion
from trimtab_client.seeds import derive_seed, sample_seeds
from trimtab_client.splitting import consecutive
from trimtab_client.versions import pin_to_proto

VERSION = ModelVersion("run", "policy", 3, "blake3:aa")


def test_a_version_survives_the_wire_and_reads_well():
    assert ModelVersion.from_proto(VERSION.to_proto()) == VERSION
    assert str(VERSION) == "run/policy@3" and str(ModelVersion("", "gpt2", 0)) == "gpt2"


def test_pins():
    assert pin_to_proto(None) is None
    exact, least = pin_to_proto(VERSION), pin_to_proto(AtLeast(0))
    assert exact is not None and ModelVersion.from_proto(exact.exact) == VERSION
    assert least is not None and least.WhichOneof("rule") == "at_least_step"


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_a_seed_means_the_same_to_the_sdk_and_to_the_generator(seed, prompt, sample):
    assert derive_seed(seed, prompt, sample) == seed_of_the_generator(seed, prompt, sample)


def test_seeds_without_a_seed_are_drawn():
    drawn = [seed for row in sample_seeds(3, 4, None, None) for seed in row]
    assert len(set(drawn)) == 12 and sample_seeds(1, 1, None, None) != sample_seeds(1, 1, None, None)
    assert sample_seeds(2, 2, 5, None) == sample_seeds(2, 2, 5, None)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_is_a_uint64(seed):
    with pytest.raises(ValueError, match=r"sampling\.seed"):
        sample_seeds(1, 1, seed, None)


@given(st.lists(st.integers(0, 30), max_size=40), st.integers(0, 9), st.integers(0, 60))
def test_runs_cover_all_items_once_and_stay_within_the_limits(sizes, most_items, most_size):
    runs = consecutive(sizes, most_items, most_size)
    assert [index for run in runs for index in range(run.start, run.stop)] == list(range(len(sizes)))
    for run in runs:
        assert len(sizes[run]) > 0 or not sizes
        assert not most_items or len(sizes[run]) <= most_items
        assert not most_size or sum(sizes[run]) <= most_size or len(sizes[run]) == 1
