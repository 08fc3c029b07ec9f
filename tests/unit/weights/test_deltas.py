"""Whatever travels as deltas comes out bit for bit."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.weights.delta_folders import WIDTHS, Bits, changed_bits, files_of, random_bits, write_folder
from trimtab.weights import delta_codec
from trimtab.weights.delta_file import DELTA_FILE
from trimtab.weights.delta_publish import Deltas
from trimtab.weights.manifest import Manifest
from trimtab.weights.store import Store, open_store

Publish = Callable[..., Manifest]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def bf16_chain(length: int, share: float = 0.02, elements: int = 40_000) -> Iterator[dict[str, dict[str, Bits]]]:
    """Steps of one model of two shards, each with a share of its elements changed."""
    rng = np.random.default_rng(7)
    files = {
        "model-00001.safetensors": {"embed": random_bits(rng, "BF16", (elements // 40, 40))},
        "model-00002.safetensors": {"norm": random_bits(rng, "F32", (40,)), "out": random_bits(rng, "BF16", (40, 40))},
    }
    for _ in range(length):
        yield files
        files = {
            name: {key: changed_bits(rng, bits, share) for key, bits in tensors.items()}
            for name, tensors in files.items()
        }


@pytest.fixture
def publish_chain(store: Store, tmp_path: Path) -> Callable[[int], list[dict[str, bytes]]]:
    """publish_chain(length) publishes steps 0, 1, … with deltas and returns their plain files."""

    def publish(length: int, full_every: int = 16) -> list[dict[str, bytes]]:
        plain = []
        for step, files in enumerate(bf16_chain(length)):
            folder = write_folder(tmp_path / f"step-{step}", files)
            store.publish(folder, run_id="r", name="policy", step=step, deltas=Deltas(full_every))
            plain.append(files_of(folder))
        return plain

    return publish


def test_every_version_of_a_chain_is_pulled_as_it_was_published(
    store: Store, publish_chain: Callable[..., list[dict[str, bytes]]], tmp_path: Path
) -> None:
    plain = publish_chain(6, full_every=4)
    kinds = [manifest.kind for manifest in store.versions()]
    assert kinds == ["full", "delta", "delta", "delta", "full", "delta"]
    reader = open_store(store.url)
    for step in (5, 3, 0, 1):
        manifest = reader.pull(reader.get("r", "policy", step), tmp_path / f"pulled-{step}")
        assert files_of(tmp_path / f"pulled-{step}") == plain[step]
        assert reader.verify(manifest) == manifest
    assert store.get("r", "policy", 3).size_bytes < 0.15 * store.get("r", "policy", 0).size_bytes


def test_a_fetch_goes_on_from_what_the_cache_has(
    store: Store, publish_chain: Callable[..., list[dict[str, bytes]]], tmp_path: Path
) -> None:
    plain = publish_chain(5)
    cold = tmp_path / "cold"
    for step in (1, 4, 2):
        assert files_of(store.fetch(store.get("r", "policy", step), cold)) == plain[step]
    damaged = next((cold / "r" / "policy").glob("step-000000000002-*")) / "model-00001.safetensors"
    damaged.chmod(0o644)
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    assert files_of(store.fetch(store.get("r", "policy", 3), cold)) == plain[3], "a damaged copy is passed over"


def test_retention_keeps_the_parents_of_a_kept_delta(
    store: Store, publish_chain: Callable[..., list[dict[str, bytes]]], tmp_path: Path
) -> None:
    plain = publish_chain(7, full_every=3)
    gone = store.prune("r", "policy", keep_last=2)
    assert [manifest.version.step for manifest in gone] == [0, 1, 2], "5 is a delta on 4, 4 on 3, and 6 is full"
    for step in (3, 4, 5, 6):
        store.pull(store.get("r", "policy", step), tmp_path / f"left-{step}")
        assert files_of(tmp_path / f"left-{step}") == plain[step]


def test_the_same_content_again_is_a_no_op_and_a_roll_back_branches(store: Store, tmp_path: Path) -> None:
    folders = [write_folder(tmp_path / f"s{step}", files) for step, files in enumerate(bf16_chain(4))]
    for step in range(3):
        store.publish(folders[step], run_id="r", name="policy", step=step, deltas=Deltas())
    again = store.publish(folders[2], run_id="r", name="policy", step=2, deltas=Deltas())
    assert again == store.get("r", "policy", 2)
    store.set_current("r", "policy", 1)
    branched = store.publish(folders[3], run_id="r", name="policy", step=3, deltas=Deltas())
    assert branched.parent == "r/policy@1"
    store.pull(branched, tmp_path / "branched")
    assert files_of(tmp_path / "branched") == files_of(folders[3])


def test_what_changes_nearly_everywhere_is_published_full(store: Store, tmp_path: Path) -> None:
    for step, files in enumerate(bf16_chain(2, share=0.9)):
        store.publish(write_folder(tmp_path / f"s{step}", files), run_id="r", name="p", step=step, deltas=Deltas())
    assert [manifest.kind for manifest in store.versions()] == ["full", "full"]


def test_new_gone_and_reshaped_tensors_and_settings_come_through(store: Store, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    big, small = random_bits(rng, "BF16", (300, 40)), random_bits(rng, "BF16", (4, 6))
    states = [
        {"model.safetensors": {"big": big, "small": small}},
        {"model.safetensors": {"big": changed_bits(rng, big, 0.01), "other": small}},  # one gone, one new
        {"model.safetensors": {"big": big, "other": Bits("BF16", (6, 4), small.data)}},  # another shape
        {"model.safetensors": {"big": big, "other": small}, "adapter/w.safetensors": {"big": small}},  # shape before
        {"model.safetensors": {"small": small, "big": big}},  # another order, a file less
    ]
    for step, files in enumerate(states):
        folder = write_folder(tmp_path / f"s{step}", files, settings=f'{{"step": {step // 2}}}')
        manifest = store.publish(folder, run_id="r", name="p", step=step, deltas=Deltas(max_share=1.0))
        assert manifest.kind == ("delta" if step else "full")
        store.pull(manifest, tmp_path / f"p{step}")
        assert files_of(tmp_path / f"p{step}") == files_of(folder)


SHAPES = st.lists(st.integers(0, 9), min_size=0, max_size=3).map(tuple)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    dtypes=st.lists(st.sampled_from(sorted(WIDTHS)), min_size=1, max_size=4),
    shapes=st.lists(SHAPES, min_size=4, max_size=4),
    shares=st.lists(st.sampled_from([0.0, 0.01, 0.2, 1.0]), min_size=1, max_size=4),
    tied=st.booleans(),
    stretch=st.sampled_from([1, 3, 16, 1 << 22]),
    seed=st.integers(0, 1 << 30),
)
def test_any_chain_of_deltas_is_bit_exact(
    dtypes: list[str], shapes: list[tuple[int, ...]], shares: list[float], tied: bool, stretch: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        for module in ("delta_codec", "delta_file", "delta_make", "delta_apply"):
            patch.setattr(f"trimtab.weights.{module}.STRETCH_ELEMENTS", stretch, raising=False)
        base = Path(scratch)
        store = open_store(str(base / "store"))
        deltas = Deltas(max_share=1.0, cache_dir=base / "cache")
        tensors = {f"t{i}": random_bits(rng, dtype, shapes[i]) for i, dtype in enumerate(dtypes)}
        served = {name: np.frombuffer(b.data, f"<u{WIDTHS[b.dtype]}") for name, b in tensors.items()}
        first: Manifest | None = None
        for step, share in enumerate([0.0, *shares]):
            tensors = {name: changed_bits(rng, bits, share) for name, bits in tensors.items()}
            if tied:
                tensors["head"] = tensors["t0"]
                served.setdefault("head", served["t0"])
            folder = write_folder(base / f"s{step}", {"model.safetensors": tensors})
            manifest = store.publish(folder, run_id="r", name="p", step=step, deltas=deltas)
            first = first or manifest
            store.pull(manifest, base / f"p{step}")
            assert files_of(base / f"p{step}") == files_of(folder)
        with store.changes(first.version, manifest.version) as changes:
            if changes is None:  # nothing ever changed enough to be worth a delta, or a full one lies between
                return
            staged = changes.staged(served, first.version.digest)
        for name, bits in tensors.items():
            assert staged.get(name, served[name]).tobytes() == bits.data


@given(st.lists(st.integers(0, 3000), unique=True, min_size=1), st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=100, deadline=None)
def test_positions_and_values_come_out_of_their_frames(positions: list[int], width: int) -> None:
    where = np.array(sorted(positions))
    values = np.random.default_rng(0).integers(0, 256, len(where) * width, dtype=np.uint8).view(f"<u{width}")
    stretch = delta_codec.Stretch(3001, where, values)
    got = delta_codec.decode(*delta_codec.encode(stretch), 3001, len(where), width)
    assert got.positions is not None
    assert (got.positions == where).all() and (got.values == values).all()


def test_deltas_work_without_torch(tmp_path: Path) -> None:
    folders = [write_folder(tmp_path / f"s{step}", files) for step, files in enumerate(bf16_chain(2))]
    program = (
        "import sys; from pathlib import Path\n"
        "from trimtab.weights.store import open_store; from trimtab.weights.delta_publish import Deltas\n"
        "store = open_store(sys.argv[1])\n"
        "for step in (0, 1): m = store.publish(Path(sys.argv[2 + step]), run_id='r', name='p', step=step, "
        "deltas=Deltas())\n"
        "store.fetch(m); assert m.kind == 'delta'\n"
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "st"), *map(str, folders)], check=True, timeout=120)


def test_the_delta_file_is_all_that_a_delta_adds(store: Store, tmp_path: Path) -> None:
    for step, files in enumerate(bf16_chain(2)):
        folder = write_folder(tmp_path / f"s{step}", files)
        manifest = store.publish(folder, run_id="r", name="p", step=step, deltas=Deltas())
    assert [entry.name for entry in manifest.files] == [DELTA_FILE]
    assert {entry.name for entry in manifest.content} == set(files_of(folder))
