"""Vector stores: what a killed, a disturbed or a second build leaves, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bakeoff.data.vector_store import VectorStore
from bakeoff.errors import DataError, StoreError

TEXTS = [f"text number {row}" for row in range(53)]
PRINT = {"model": "m1", "layer": -1, "pooling": "mean", "template": None}


def embed(texts):
    """Return vectors that depend on the text alone."""
    rows = [np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype=np.uint8) for text in texts]
    return np.array(rows, dtype=np.float32)[:, :6] / 255


class Counting:
    """An `embed` that counts, and stops after some texts as a user's Ctrl-C would."""

    def __init__(self, stop_after=None):
        self.texts, self.stop_after = [], stop_after

    def __call__(self, texts):
        if self.stop_after is not None and len(self.texts) + len(texts) > self.stop_after:
            raise KeyboardInterrupt
        self.texts += texts
        return embed(texts)


def build(path, texts=TEXTS, embed=embed, fingerprint=PRINT, rows_per_shard=10, **options):
    return VectorStore.build(
        path, texts, embed, fingerprint=fingerprint, rows_per_shard=rows_per_shard, **options
    )


def test_holds_what_was_embedded(tmp_path):
    store = build(tmp_path / "s")
    expected = embed(TEXTS)
    assert (len(store), store.dimension) == (53, 6)
    np.testing.assert_array_equal(np.asarray(store), expected)
    assert np.asarray(store, dtype=np.float64).dtype == np.float64
    wanted = [50, 3, 3, 0, 29, 30]
    np.testing.assert_array_equal(store.take(wanted), expected[wanted])
    assert store.take([]).shape == (0, 6)
    assert store.fingerprint == PRINT
    again = VectorStore.open(tmp_path / "s", PRINT, verify=True)
    np.testing.assert_array_equal(np.asarray(again), expected)
    assert again.digest == store.digest


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60))
def test_blocks_cover_all_rows_in_order(tmp_path_factory, shard, rows):
    store = build(tmp_path_factory.mktemp("s"), rows_per_shard=shard)
    starts, blocks = zip(*store.blocks(rows), strict=True)
    assert list(starts) == list(range(0, 53, rows))
    assert all(len(block) == rows for block in blocks[:-1])
    np.testing.assert_array_equal(np.concatenate(blocks), embed(TEXTS))


def test_blocks_within_a_shard_are_views_and_read_only(tmp_path):
    store = build(tmp_path / "s")
    _, block = next(store.blocks(5))
    assert not block.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        block[0, 0] = 1


def test_a_function_streams_and_is_called_once_per_build(tmp_path):
    alive, most = 0, 0

    def read():
        nonlocal alive, most
        for text in TEXTS:
            alive += 1
            most = max(most, alive)
            yield text

    def embed_and_forget(texts):
        nonlocal alive
        alive -= len(texts)
        return embed(texts)

    seen = []
    store = build(tmp_path / "s", read, embed_and_forget, progress=lambda *step: seen.append(step))
    assert most <= 10  # never more than one shard of texts
    assert seen == [(10, 0), (20, 0), (30, 0), (40, 0), (50, 0), (53, 0)]
    assert store.digest == build(tmp_path / "t").digest
    build(tmp_path / "t", progress=lambda *step: seen.append(step))
    assert seen[-1] == (53, 53)


@pytest.mark.parametrize("stop_after", [0, 9, 10, 25, 52])
def test_an_interrupted_build_goes_on(tmp_path, stop_after):
    first = Counting(stop_after)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "s", embed=first)
    if first.texts:
        with pytest.raises(StoreError, match=f"not finished \\({len(first.texts)} rows are"):
            VectorStore.open(tmp_path / "s")
    second = Counting()
    store = build(tmp_path / "s", embed=second)
    assert first.texts + second.texts == TEXTS
    whole = build(tmp_path / "t")
    assert store.digest == whole.digest
    np.testing.assert_array_equal(np.asarray(store), np.asarray(whole))
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in "st"]
    assert manifests[0] == manifests[1]


def test_a_killed_process_leaves_whole_shards(tmp_path):
    script = tmp_path / "builder.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, time
            import numpy as np
            from bakeoff.data.vector_store import VectorStore
            from tests.data.test_vector_store import PRINT, TEXTS, embed

            def slowly(texts):
                time.sleep(0.15)
                return embed(texts)

            print("ready", flush=True)
            VectorStore.build(sys.argv[1], TEXTS, slowly, fingerprint=PRINT, rows_per_shard=2)
            """
        )
    )
    folder = tmp_path / "s"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder)], stdout=subprocess.PIPE, env=environment
    )
    try:
        deadline = time.monotonic() + 60
        while len(list(folder.glob("shard-*.npy"))) < 3:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        with pytest.raises(StoreError, match="another process is building"):
            build(folder, rows_per_shard=2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    (folder / ".shard-00009.npy.abc.part").write_bytes(b"half")  # a shard that was being written
    second = Counting()
    store = build(folder, embed=second, rows_per_shard=2)
    assert len(second.texts) <= 53 - 4  # the last whole shard may lack its line in the manifest
    assert second.texts == TEXTS[-len(second.texts) :]
    assert store.digest == build(tmp_path / "t", rows_per_shard=2).digest
    assert not list(folder.glob(".*.part"))


def test_a_finished_store_is_not_embedded_again(tmp_path):
    store = build(tmp_path / "s")
    nothing = Counting()
    assert build(tmp_path / "s", embed=nothing, rows_per_shard=7).digest == store.digest
    assert nothing.texts == []


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([*TEXTS[:12], "changed", *TEXTS[13:]], "rows 10 to 19 differ"),
        ([*TEXTS[:12], TEXTS[13], TEXTS[12], *TEXTS[14:]], "rows 10 to 19 differ"),
        (TEXTS[:50], "has 53 rows already, and there are only 50"),
        (TEXTS[:51], "rows 50 to 52 differ"),
        ([*TEXTS, "more"], "rows 50 to 52 differ"),
        (["text", " number 0", *TEXTS[1:]], "rows 0 to 9 differ"),
    ],
)
def test_other_texts_are_refused(tmp_path, texts, message):
    build(tmp_path / "s")
    with pytest.raises(DataError, match=message):
        build(tmp_path / "s", texts)
    assert VectorStore.open(tmp_path / "s", verify=True).digest == build(tmp_path / "s").digest


def test_a_finished_store_does_not_grow(tmp_path):
    build(tmp_path / "s", TEXTS[:50])
    with pytest.raises(DataError, match="finished with 50 rows, and there are more"):
        build(tmp_path / "s")


def test_a_border_between_texts_counts(tmp_path):
    digests = {build(tmp_path / str(i), t).digest for i, t in enumerate([["ab", "c"], ["a", "bc"]])}
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "m2"}, "model is 'm1' there and 'm2' here"),
        ({"layer": -2, "pooling": "last"}, "layer is -1 there and -2 here; pooling is 'mean'"),
        ({"template": "tulu"}, "template is None there and 'tulu' here"),
        ({"max_length": 5}, "max_length is absent there and 5 here"),
    ],
)
def test_another_fingerprint_is_refused_and_named(tmp_path, change, message):
    build(tmp_path / "s")
    other = {**PRINT, **change}
    with pytest.raises(DataError, match=message):
        VectorStore.open(tmp_path / "s", other)
    with pytest.raises(DataError, match=message):
        build(tmp_path / "s", fingerprint=other)


def test_a_build_that_kept_nothing_may_begin_otherwise(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "s", embed=Counting(0))
    assert build(tmp_path / "s", fingerprint={"model": "m2"}).fingerprint == {"model": "m2"}


def test_the_fingerprint_is_compared_as_json(tmp_path):
    build(tmp_path / "s", fingerprint={"shape": (1, 2), "b": 1, "a": 2})
    VectorStore.open(tmp_path / "s", {"a": 2, "b": 1, "shape": [1, 2]})
    with pytest.raises(DataError, match="JSON"):
        build(tmp_path / "t", fingerprint={"model": object()})


def _flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "is missing": lambda path: path.unlink(),
    "bytes, not": lambda path: path.write_bytes(path.read_bytes()[:-8]),
    "SHA-256 of shard-00002": _flip_a_bit,
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_shard_is_found_and_mended(tmp_path, message):
    digest = build(tmp_path / "s").digest
    DAMAGES[message](tmp_path / "s" / "shard-00002.npy")
    with pytest.raises(StoreError, match=message):
        VectorStore.open(tmp_path / "s", verify=True)
    if "SHA" not in message:  # sizes are compared in any case
        with pytest.raises(StoreError, match=message):
            VectorStore.open(tmp_path / "s")
    counting = Counting()
    with pytest.warns(UserWarning, match=message):
        assert build(tmp_path / "s", embed=counting).digest == digest
    assert counting.texts == TEXTS[20:30]
    VectorStore.open(tmp_path / "s", verify=True)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda v: np.where(np.arange(len(v))[:, None] == 4, np.nan, v), "NaN or inf for row 24"),
        (lambda v: np.where(np.arange(len(v))[:, None] == 4, 1e300, v), "NaN or inf for row 24"),
        (lambda v: v[:-1], r"\(10, d\) for 10 texts, got shape \(9, 6\)"),
        (lambda v: v[:, :0], "got shape"),
        (lambda v: v[:, :5], "width 6 as for the first rows, got 5 from row 20"),
        (lambda v: v.astype(str), "must return numbers"),
    ],
)
def test_bad_vectors_are_refused_and_the_rest_is_kept(tmp_path, result, message):
    def sometimes(texts):
        vectors = embed(texts)
        return result(vectors.astype(np.float64)) if texts[0] == TEXTS[20] else vectors

    with pytest.raises(DataError, match=message):
        build(tmp_path / "s", embed=sometimes)
    counting = Counting()
    build(tmp_path / "s", embed=counting)
    assert counting.texts == TEXTS[20:]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "at least one entry"),
        ("one text", "got one string"),
        (["a", 3], r"texts\[1\] must be a string, got int"),
    ],
)
def test_bad_texts_are_refused(tmp_path, texts, message):
    with pytest.raises(DataError, match=message):
        build(tmp_path / "s", texts)


def test_folders_of_others_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"not empty \(it has thesis.txt\)"):
        build(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["thesis.txt"]
    with pytest.raises(DataError, match="is a file"):
        build(tmp_path / "thesis.txt")
    with pytest.raises(DataError, match="is no vector store"):
        VectorStore.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:40], "cannot be read"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "not of format 1"),
        (lambda text: json.dumps({"format": 1}), "lacks 'complete'"),
    ],
)
def test_a_bad_manifest_is_refused(tmp_path, change, message):
    build(tmp_path / "s")
    manifest = tmp_path / "s" / "manifest.json"
    manifest.write_text(change(manifest.read_text()))
    with pytest.raises(StoreError, match=message):
        VectorStore.open(tmp_path / "s")
    with pytest.raises(StoreError, match=message):
        build(tmp_path / "s")


def test_indices_out_of_range_are_refused(tmp_path):
    store = build(tmp_path / "s")
    for bad in ([53], [-1], [[1]], [0.5]):
        with pytest.raises(DataError, match="indices"):
            store.take(bad)


def test_many_shards_need_few_open_files(tmp_path):
    store = build(tmp_path / "s", rows_per_shard=1)
    for _ in store.blocks(1):
        pass
    store.take(range(53))
    assert len(store._mapped) <= 8
    copy = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(np.asarray(copy), embed(TEXTS))


def test_texts_outside_unicode_are_hashed(tmp_path):
    assert len(build(tmp_path / "s", ["\ud800", "é", ""], lambda t: np.ones((len(t), 2)))) == 3


def test_a_second_builder_may_wait_for_the_first(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    second = Counting()
    with ThreadPoolExecutor(1) as threads:

        def slowly(texts):
            if not waiting:
                waiting.append(threads.submit(build, tmp_path / "s", embed=second, wait=True))
                time.sleep(0.2)
                assert not waiting[0].done()
            return embed(texts)

        waiting = []
        first = build(tmp_path / "s", embed=slowly)
        assert waiting[0].result(timeout=30).digest == first.digest
    assert second.texts == []
