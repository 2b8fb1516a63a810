from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models import tiny

from bakeoff.errors import CacheError
from bakeoff.models import feature_cache
from bakeoff.models.feature_cache import FeatureCache
from bakeoff.models.states import hidden_states

TEXTS = ["the cat sat", "dog", "a red dog ran under the tree", "the cat sat", "", "mat mat"]
BASE = tiny.base()


def expected(base, texts, **options) -> dict[str, list[torch.Tensor]]:
    """The same, computed without a cache."""
    found: dict[int, list[torch.Tensor]] = {}
    for batch in hidden_states(base, texts, **options):
        for row, i in enumerate(batch.indices.tolist()):
            tokens = batch.tokens[batch.offsets[row] : batch.offsets[row + 1]]
            found[i] = [batch.layer_means[row], batch.layer_lasts[row], tokens]
    return {
        name: [found[i][which] for i in range(len(texts))]
        for which, name in enumerate(("layer_means", "layer_lasts", "tokens"))
    }


def assert_right(features, base, texts, **options) -> None:
    assert len(features) == len(texts)
    reference = expected(base, texts, **options)
    every = np.arange(len(texts))
    for kind in ("layer_means", "layer_lasts"):
        got = getattr(features, kind)(every)
        assert got.shape == (len(texts), base.num_layers + 1, base.hidden_size)
        assert got.dtype == torch.float32
        for row, value in zip(got, reference[kind], strict=True):
            torch.testing.assert_close(row, value, atol=1e-5, rtol=6e-4)
    tokens, mask = features.tokens(every)
    assert mask.dtype == torch.int64
    for row, kept, value in zip(tokens, mask.bool(), reference["tokens"], strict=True):
        torch.testing.assert_close(row[kept], value, atol=1e-5, rtol=6e-4)
        assert not kept[len(value) :].any()
        assert not row[~kept].any()
    assert features.n_tokens.tolist() == [len(value) for value in reference["tokens"]]


def shards(cache: FeatureCache) -> list[Path]:
    return sorted(cache.directory.rglob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)


class Reads:
    """Counts the texts that a model reads while its features are computed."""

    def __init__(self, base):
        self.n_texts = 0
        self.longest = 0
        self.base = base

    def __enter__(self):
        def count(module, args, kwargs):
            rows, width = kwargs["input_ids"].shape
            self.n_texts += rows
            self.longest = max(self.longest, width)

        self.hook = self.base.model.register_forward_pre_hook(count, with_kwargs=True)
        # The first pass and the first look at a model run probes; have them done before counting.
        for attention in ("causal", "bidirectional"):
            list(hidden_states(self.base, ["dog"], attention=attention))
        probes = self.n_texts
        list(hidden_states(self.base, ["dog"], attention="bidirectional"))
        self.probes_per_call, self.n_texts = self.n_texts - probes - 1, 0
        return self

    def __exit__(self, *_):
        self.hook.remove()

    def texts(self) -> int:
        return self.n_texts - self.probes_per_call * bool(self.n_texts)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_features_are_the_hidden_states_and_computed_once(tmp_path, attention):
    cache = FeatureCache(tmp_path)
    options = {"attention": attention, "prefixes": ["", "a ", "", "the big ", "", ""]}
    with Reads(BASE) as reads:
        cold = cache.features(BASE, TEXTS, **options)
        assert reads.texts() == len(TEXTS)
        assert_right(cold, BASE, TEXTS, **options)
    with Reads(BASE) as reads:
        warm = cache.features(BASE, TEXTS, **options)
        other = FeatureCache(tmp_path).features(BASE, TEXTS, **options)
        assert reads.n_texts == 0
    for kind in ("layer_means", "layer_lasts"):
        for features in (warm, other):
            assert torch.equal(features.load(kind), cold.load(kind))


SENTENCES = st.lists(
    st.lists(st.sampled_from(tiny.WORDS[:4]), max_size=4).map(" ".join), max_size=8
)


@settings(max_examples=25, deadline=None)
@given(calls=st.lists(SENTENCES, min_size=1, max_size=4))
def test_any_sequence_of_calls_reads_each_text_once(calls):
    with tempfile.TemporaryDirectory() as directory, Reads(BASE) as reads:
        cache = FeatureCache(directory)
        seen: set[str] = set()
        for texts in calls:
            before = reads.n_texts
            features = cache.features(BASE, texts, batch_tokens=16)
            n_read = reads.n_texts - before
            new = set(texts) - seen
            assert n_read - reads.probes_per_call * bool(n_read) == len(new)
            seen |= new
            assert_right(features, BASE, texts)


def test_everything_that_changes_states_changes_the_address(tmp_path):
    cache = FeatureCache(tmp_path)
    half = tiny.base()
    half.model.to(torch.bfloat16)
    variants = [
        (BASE, {}),
        (tiny.base(eos=True), {}),
        (tiny.base(seed=1), {}),
        (half, {}),
        (BASE, {"attention": "bidirectional"}),
        (BASE, {"max_length": 2}),
        (BASE, {"prefixes": "the "}),
        (dataclasses.replace(BASE, fingerprint="f" * 64), {}),
    ]
    text = ["a red dog ran"]
    n_rows = 0
    for base, options in variants:
        before = len(shards(cache))
        features = cache.features(base, text, **options)
        assert len(shards(cache)) == before + 1, options
        reference = expected(base, text, **options)
        torch.testing.assert_close(
            features.layer_means([0])[0], reference["layer_means"][0], atol=1e-5, rtol=6e-4
        )
        n_rows += 1
    for base, options in variants:
        cache.features(base, text, **options)
    assert len(shards(cache)) == n_rows
    # A limit that cuts nothing off leaves the ids, and so the address, as they are.
    cache.features(BASE, text, max_length=50)
    assert len(shards(cache)) == n_rows
    # The prefix is part of the ids, but which of them are kept differs.
    cache.features(BASE, ["the a red dog ran"])
    assert len(shards(cache)) == n_rows + 1


def test_truncation_is_counted_warm_and_cold(tmp_path):
    cache = FeatureCache(tmp_path)
    for _ in range(2):
        assert cache.features(BASE, TEXTS, max_length=2).truncated == 3
        assert cache.features(BASE, TEXTS).truncated == 0


def test_selection_of_texts_and_layers(tmp_path):
    features = FeatureCache(tmp_path).features(BASE, TEXTS)
    every = features.load("layer_means")
    for indices in ([4, 0, 0, -1], np.array([1]), torch.tensor([5, 2]), range(3), []):
        index = torch.as_tensor(list(indices), dtype=torch.long)
        assert torch.equal(features.layer_means(indices), every[index])
        got = features.layer_means(indices, layers=[-1, 0, 3])
        assert torch.equal(got, every[index][:, [4, 0, 3]])
    assert torch.equal(features.load("layer_lasts", [2]), features.load("layer_lasts")[:, 2:3])
    tokens, mask = features.tokens([])
    assert tokens.shape == (0, 0, 32)
    assert mask.shape == (0, 0)
    features.layer_means([0]).zero_()  # what is handed out is a copy
    assert torch.equal(features.load("layer_means"), every)
    for bad in ([6], [-7], [0.5], 3, [[0]]):
        with pytest.raises(IndexError, match="indices"):
            features.layer_means(bad)
    with pytest.raises(IndexError, match="layers: 5 is out of range for 5"):
        features.layer_means([0], layers=[5])
    with pytest.raises(ValueError, match=r"kind must be .*'tokens'"):
        features.load("tokens")


def test_no_texts(tmp_path):
    features = FeatureCache(tmp_path).features(BASE, [])
    assert len(features) == 0
    assert features.load("layer_means").shape == (0, 5, 32)


def test_a_text_beyond_float16_is_kept_in_float32_and_changes_no_other(tmp_path):
    base = tiny.base()
    base.model.embed_tokens.weight.data[4 + tiny.WORDS.index("tree")] *= 1e6
    ordinary = ["the cat sat", "dog"]
    texts = [ordinary[0], "a tree", ordinary[1]]
    alone = FeatureCache(tmp_path / "alone").features(base, ordinary)
    mixed = FeatureCache(tmp_path / "mixed").features(base, texts)
    assert mixed.layer_means([1]).abs().max() > 65504
    torch.testing.assert_close(
        mixed.layer_means([1])[0], expected(base, texts)["layer_means"][1], atol=0, rtol=1e-6
    )
    for kind in ("layer_means", "layer_lasts"):
        assert torch.equal(mixed.load(kind)[[0, 2]], alone.load(kind))
    dtypes = {_dtype(path) for path in (tmp_path / "mixed").rglob("*.safetensors")}
    assert dtypes == {torch.float16, torch.float32}
    assert {_dtype(path) for path in (tmp_path / "alone").rglob("*.safetensors")} == {torch.float16}


def _dtype(path: Path) -> torch.dtype:
    from safetensors.torch import load_file

    return load_file(path)["layer_means"].dtype


def test_shards_are_cut_as_texts_come(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "_SHARD_TEXTS", 2)
    cache = FeatureCache(tmp_path)
    seen = []
    texts = [" ".join(tiny.WORDS[: i + 1]) for i in range(7)]
    features = cache.features(
        BASE, texts, batch_tokens=1, progress=lambda f, m: seen.append((f, m, len(shards(cache))))
    )
    assert len(shards(cache)) == 4
    assert [n for _, _, n in seen] == [0, 1, 1, 2, 2, 3, 3]
    assert [f for f, _, _ in seen] == sorted(f for f, _, _ in seen)
    assert seen[0][0] == 7 / 28
    assert seen[-1][:2] == (1.0, "7 of 7 texts read")
    assert_right(features, BASE, texts)


# Damage -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    cache = FeatureCache(tmp_path_factory.mktemp("sound"))
    features = cache.features(BASE, TEXTS)
    (path,) = shards(cache)
    values = {k: features.load(k) for k in ("layer_means", "layer_lasts")}
    return path.relative_to(cache.directory), path.read_bytes(), values, features.tokens(range(6))


def check_after_damage(sound, data: bytes) -> None:
    name, _, values, (tokens, mask) = sound
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / name
        path.parent.mkdir()
        path.write_bytes(data)
        features = FeatureCache(directory).features(BASE, TEXTS)
        for kind, value in values.items():
            torch.testing.assert_close(features.load(kind), value, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(features.tokens(range(6))[0], tokens, atol=1e-3, rtol=1e-3)
        assert torch.equal(features.tokens(range(6))[1], mask)


@pytest.mark.filterwarnings("ignore:.*is damaged")
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_flipped_bit_gives_a_wrong_answer(sound, data):
    content = bytearray(sound[1])
    # Half of the flips in the header, which is a small part of the file.
    limit = data.draw(st.sampled_from([600, len(content)]))
    at = data.draw(st.integers(0, limit - 1))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    check_after_damage(sound, bytes(content))


@pytest.mark.parametrize("keep", [0, 1, 7, 100, 700, -1])
def test_a_cut_shard_is_computed_again(sound, keep):
    with pytest.warns(UserWarning, match=r"safetensors is damaged"):
        check_after_damage(sound, sound[1][:keep])


def test_foreign_content_is_computed_again(sound):
    from safetensors.torch import save

    for content in (b"not a shard" * 100, save({"keys": torch.zeros(2)}), sound[1] + b"tail"):
        with pytest.warns(UserWarning, match="is damaged"):
            check_after_damage(sound, content)


def test_zeros_in_place_of_data_are_noticed(sound):
    """What a power cut can leave: the right length, but pages that were never written."""
    content = sound[1]
    with pytest.warns(UserWarning, match="is damaged"):
        check_after_damage(sound, content[: len(content) // 2] + bytes(len(content) // 2 + 1))


# Size ---------------------------------------------------------------------------------------------


def test_the_least_recently_used_shards_go_first(tmp_path):
    sizes = FeatureCache(tmp_path / "size")
    sizes.features(BASE, ["the cat"])
    size = shards(sizes)[0].stat().st_size
    cache = FeatureCache(tmp_path / "cache", max_bytes=3 * size + size // 2)

    def ask(text: str) -> bool:
        """Ask for a text and forget it; tell whether it had to be computed."""
        with Reads(BASE) as reads:
            FeatureCache(cache.directory, cache.max_bytes).features(BASE, [text])
        time.sleep(0.01)  # file systems' clocks are coarse
        return reads.n_texts > 0

    assert [ask(t) for t in ("the cat", "a cat", "cat cat")] == [True] * 3
    assert not ask("the cat")  # now used more recently than "a cat"
    assert ask("on cat")  # the fourth: one must go
    assert len(shards(cache)) == 3
    assert [ask(t) for t in ("the cat", "cat cat", "on cat")] == [False] * 3
    assert ask("a cat")


def test_what_a_call_or_a_living_handle_needs_is_never_evicted(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "_SHARD_TEXTS", 1)
    cache = FeatureCache(tmp_path, max_bytes=0)
    texts = ["the cat", "a dog", "on a mat"]
    first = cache.features(BASE, texts)
    assert len(shards(cache)) == 3
    second = cache.features(BASE, ["tree"])
    assert len(shards(cache)) == 4
    pickle.loads(pickle.dumps(first)).load("layer_means")
    del first
    cache.features(BASE, ["saw"])
    assert len(shards(cache)) == 2  # that of `second` and the one just made
    assert_right(second, BASE, ["tree"])


def test_a_shard_evicted_elsewhere_stays_readable_here(tmp_path):
    cache = FeatureCache(tmp_path)
    features = cache.features(BASE, TEXTS)
    copy = pickle.dumps(features)
    for path in shards(cache):
        path.unlink()
    assert_right(features, BASE, TEXTS)
    with pytest.raises(CacheError, match=r"no longer holds .*raise max_bytes"):
        pickle.loads(copy).layer_means([0])
    assert_right(cache.features(BASE, TEXTS), BASE, TEXTS)  # and a new call computes it again
    assert len(shards(cache)) == 1


def test_leftovers_of_killed_writers_are_cleared_once_they_are_old(tmp_path):
    cache = FeatureCache(tmp_path)
    cache.features(BASE, ["dog"])
    folder = shards(cache)[0].parent
    old, new = folder / ".a.safetensors.x.part", folder / ".b.safetensors.y.part"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 90_000,) * 2)
    cache.features(BASE, ["cat"])
    assert not old.exists()
    assert new.exists()


# Other processes ----------------------------------------------------------------------------------


def test_a_spawned_worker_reads_a_pickled_handle(tmp_path):
    features = FeatureCache(tmp_path).features(BASE, TEXTS)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=tiny.read_in_worker, args=(features, queue))
    worker.start()
    means, (tokens, mask) = queue.get(timeout=300)
    worker.join()
    assert np.array_equal(means, features.load("layer_means").numpy())
    assert np.array_equal(tokens, features.tokens([2, 0])[0].numpy())
    assert np.array_equal(mask, features.tokens([2, 0])[1].numpy())
    assert len(pickle.dumps(features)) < 10_000  # the handle travels, not the states
    cache = pickle.loads(pickle.dumps(FeatureCache(tmp_path, 123)))
    assert (cache.directory, cache.max_bytes) == (tmp_path, 123)


MANY = [" ".join(tiny.WORDS[j % 13] for j in range(i, i + 1 + i % 5)) for i in range(65)]
SCRIPT = """
import json, sys, time
directory, root, texts = sys.argv[1:]
sys.path.insert(0, root)
from bakeoff.models import feature_cache
from tests.models import tiny
feature_cache._SHARD_TEXTS = 3
def slowly(fraction, message):
    print(message, flush=True)
    time.sleep(0.02)
cache = feature_cache.FeatureCache(directory)
cache.features(tiny.base(), json.loads(texts), batch_tokens=5, progress=slowly)
"""


def start(directory: Path) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(directory), str(root), json.dumps(MANY)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_killed_pass_is_taken_up_by_two_processes_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "_SHARD_TEXTS", 3)
    doomed = start(tmp_path)
    for _ in range(9):
        assert doomed.stdout.readline()
    doomed.send_signal(signal.SIGKILL)
    doomed.communicate()

    other = start(tmp_path)
    first = other.stdout.readline()
    # 9 batches of a text or more were read, and less than a shard of 3 is lost.
    assert int(first.split(" of ")[1].split()[0]) <= len(set(MANY)) - 9 + 2
    # Now this process starts on the same texts, while the other is at work.
    features = FeatureCache(tmp_path).features(BASE, MANY, batch_tokens=5)
    output, errors = other.communicate(timeout=300)
    assert other.returncode == 0, errors
    assert output
    assert_right(features, BASE, MANY)
    with Reads(BASE) as reads:
        again = FeatureCache(tmp_path).features(BASE, MANY[::-1])
        assert reads.n_texts == 0
    assert_right(again, BASE, MANY[::-1])


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_a_full_disk_is_an_error_that_names_the_folder(tmp_path):
    import resource

    cache = FeatureCache(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(CacheError) as caught:
            cache.features(BASE, TEXTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(caught.value).startswith(f"the feature cache {tmp_path} cannot be written (")
    assert "BAKEOFF_CACHE" in str(caught.value)
    assert shards(cache) == []
    assert not list(tmp_path.rglob("*.part"))
    assert_right(cache.features(BASE, TEXTS), BASE, TEXTS)


def test_an_unusable_folder_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CacheError, match=r"file/features cannot be written .*BAKEOFF_CACHE"):
        FeatureCache(tmp_path / "file" / "features")


def test_the_default_folder_is_inside_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BAKEOFF_CACHE", str(tmp_path))
    assert FeatureCache().directory == tmp_path / "features"


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="max_bytes must not be negative, got -1"):
        FeatureCache(tmp_path, -1)
    with pytest.raises(ValueError, match=r"attention must be .*'both'"):
        FeatureCache(tmp_path).features(BASE, TEXTS, attention="both")
