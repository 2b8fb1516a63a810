"""InfLLM's attention against the authors' code, a brute force in numpy and closed-form limits."""

import contextlib
import os
import resource
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bakeoff.decoding.block_memory import (
    OFFLOADS,
    BlockHandle,
    BlockStore,
    LayerMemory,
    MemorySettings,
    Rotary,
    SavedSegment,
    TensorSource,
    write_safetensors,
)
from bakeoff.errors import CacheError, DataError

H, G, D = 4, 2, 16
CPU = torch.device("cpu")
BASE = 10_000.0


# References ---------------------------------------------------------------------------------------


def rotated(x, positions, base=BASE):
    """Rotate (..., n, D) to positions (n,) or one position, halves paired as in Llama; numpy."""
    half = x.shape[-1] // 2
    angles = np.asarray(positions, dtype=np.float64)[..., None] * base ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate((turned.real, turned.imag), -1)


def brute_force(q, k, v, calls, sizes, *, scaling=None, softcap=None, base=BASE):
    """InfLLM's five steps for one sequence, one token and one head at a time; numpy, float64.

    q is (H, T, D), k and v (G, T, D), not rotated. Returns (H, T, D), the blocks looked up by each
    chunk, and the number of blocks.
    """
    n_heads, width = q.shape[0], q.shape[2]
    group = n_heads // k.shape[0]
    window, scaling = sizes.n_local, width**-0.5 if scaling is None else scaling
    output = np.zeros((n_heads, q.shape[1], v.shape[2]))
    init, blocks, rest, looked_up = [], [], [], []
    mass = np.zeros((n_heads, q.shape[1]))

    def squashed(x):
        return x if softcap is None else softcap * np.tanh(x / softcap)

    starts = []
    position = 0
    for call in calls:
        starts += [
            (position + s, min(position + s + sizes.exec_chunk, position + call))
            for s in range(0, call, sizes.exec_chunk)
        ]
        position += call
    for a, b in starts:
        far = rotated(q[:, a:b], window - 1, base)
        chosen = list(range(len(blocks)))
        if len(blocks) > sizes.topk:
            mean = far.mean(1)
            score = [sum(mean[h] @ reps[h] for h in range(n_heads)) for _, reps in blocks]
            chosen = sorted(np.argsort(score)[::-1][: sizes.topk].tolist())
        looked_up.append(chosen)
        rest += range(a, b)
        retrieved = init + [j for c in chosen for j in blocks[c][0]]
        for i in range(a, b):
            leaving = i - window if sizes.exact_mask else b - 1 - window
            near = list(range(max(0, i - window + 1), i + 1))
            distant = retrieved + [j for j in rest if j <= leaving]
            for h in range(n_heads):
                keys, values = k[h // group], v[h // group]
                close = rotated(keys[near], near, base) @ rotated(q[h, i], i, base)
                logits = np.concatenate((close, keys[distant] @ far[h, i - a])) * scaling
                logits = squashed(logits)
                weights = np.exp(logits - logits.max())
                weights /= weights.sum()
                output[h, i] = weights @ values[near + distant]
                mass[h, near] += weights[: len(near)]
        if len(init) < sizes.n_init and len(rest) > window:
            n = min(sizes.n_init - len(init), len(rest) - window)
            init, rest = init + rest[:n], rest[n:]
        while len(rest) - sizes.block_size >= window:
            ids, rest = rest[: sizes.block_size], rest[sizes.block_size :]
            reps = []
            for h in range(n_heads):
                best = np.argsort(-mass[h, ids], kind="stable")[: sizes.repr_topk]
                reps.append(k[h // group][ids][best].mean(0))
            blocks.append((ids, reps))
    return output, looked_up, len(blocks)


def rotary(width=D, base=BASE):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    half = width // 2

    def table(length, like):
        angles = torch.arange(length)[:, None].double() * base ** (-torch.arange(half) / half)
        angles = torch.cat((angles, angles), -1)[None]
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    return Rotary(table, apply_rotary_pos_emb)


def tensors(n_tokens, seed=7, n_units=1, dtype=torch.float64, heads=H, groups=G, width=D):
    rng = np.random.RandomState(seed)
    return [
        torch.tensor(rng.standard_normal((n_units, h, n_tokens, width)), dtype=dtype)
        for h in (heads, groups, groups)
    ]


def run(memory, q, k, v, calls):
    """Feed tokens call by call; return the output and the blocks looked up by the last chunk."""
    out, s = [], 0
    for n in calls:
        out.append(memory.attend(*(x[:, :, s : s + n] for x in (q, k, v))))
        s += n
    return torch.cat(out, 2)


def memory_of(sizes, store=None, **arguments):
    store = BlockStore("cpu") if store is None else store
    return LayerMemory(sizes, rotary(arguments.pop("width", D)), store, **arguments)


SIZES = MemorySettings(4, 32, 8, 2, 2, 16, True)

# The attention ------------------------------------------------------------------------------------

# What the authors' ContextManager.append gives (run on a CPU, float32, with its PyTorch attention)
# for the inputs of `tensors(210, seed=7)`, 200 tokens in one call and ten alone:
# output[0, :, token, 3].
OFFICIAL = {
    10: (-0.305085, -0.172547, -0.711801, -0.51392),
    35: (0.095226, 0.123302, -0.477154, 0.086591),
    60: (0.191414, 0.145966, -0.245806, 0.1102),
    101: (0.086061, -0.211177, -0.119802, -0.034729),
    150: (-0.296843, 0.25999, 0.040871, -0.029905),
    199: (-0.068381, 0.202031, -0.296428, -0.528932),
    200: (-0.037294, -0.236804, 0.004611, 0.007947),
    204: (0.038713, 0.268074, 0.355514, 0.022965),
    209: (0.048337, -0.208065, 0.056822, -0.111567),
}
OFFICIAL_SUMS = (617.41533, 619.6115, 640.71268, 651.84143)
OFFICIAL_CHOICES = [[7, 17], [7, 17], [4, 13], [9, 17], [11, 17], [12, 20], [1, 4], [2, 6]]
OFFICIAL_REPRESENTATIVE = (-0.14412, 0.82381, 0.003606, -0.68805, 0.3632, -0.298101, 1.178542)


def test_numbers_of_the_official_code():
    q, k, v = tensors(210, dtype=torch.float32)
    memory = memory_of(MemorySettings(4, 32, 8, 2, 2, 16, False))
    outputs, choices = [run(memory, q[:, :, :200], k[:, :, :200], v[:, :, :200], [200])], []
    for t in range(200, 210):
        outputs.append(memory.attend(*(x[:, :, t : t + 1] for x in (q, k, v))))
        choices.append(memory.chosen[0])
    output = torch.cat(outputs, 2)[0]
    for token, expected in OFFICIAL.items():
        assert output[:, token, 3].tolist() == pytest.approx(expected, abs=2e-6)
    assert output.double().abs().sum((1, 2)).tolist() == pytest.approx(OFFICIAL_SUMS, rel=1e-6)
    assert choices[:8] == OFFICIAL_CHOICES
    assert (memory.n_blocks, memory.state()["recent"].shape[3]) == (21, 38)
    found = memory.state()["representatives"][0, 5, 0, :7].tolist()
    assert found == pytest.approx(OFFICIAL_REPRESENTATIVE, abs=2e-6)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_brute_force(data):
    draw = data.draw
    window, size = draw(st.integers(1, 20)), draw(st.integers(1, 7))
    sizes = MemorySettings(
        n_init=draw(st.integers(0, 6)),
        n_local=window,
        block_size=size,
        topk=draw(st.integers(0, 4)),
        repr_topk=draw(st.integers(1, size)),
        exec_chunk=draw(st.integers(1, window)),
        exact_mask=draw(st.booleans()),
    ).checked()
    calls = [*draw(st.lists(st.integers(1, 30), min_size=1, max_size=4)), 1, 1, 1]
    softcap = draw(st.sampled_from([None, 1.5]))
    q, k, v = tensors(sum(calls), draw(st.integers(0, 99)))
    memory = memory_of(sizes)
    s, found = 0, []
    for n in calls:
        part = [x[:, :, s : s + n] for x in (q, k, v)]
        found.append(memory.attend(*part, 0.3, softcap))
        s += n
    expected, looked_up, n_blocks = brute_force(
        *(x[0].numpy() for x in (q, k, v)), calls, sizes, scaling=0.3, softcap=softcap
    )
    assert memory.n_blocks == n_blocks
    if n_blocks and sizes.topk:
        assert memory.chosen == ([looked_up[-1]] if looked_up[-1] else [])
    # The soft-max is taken in float32 whatever the inputs are.
    np.testing.assert_allclose(torch.cat(found, 2)[0].numpy(), expected, atol=2e-6)


def test_a_window_that_holds_everything_is_full_attention():
    q, k, v = tensors(150)
    sizes = MemorySettings(4, 150, 8, 2, 2, 16, True)
    positions = np.arange(150)
    turned = [torch.tensor(rotated(x.numpy(), positions)) for x in (q, k)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *turned, v, is_causal=True, enable_gqa=True
    )
    for calls in ([150], [149, 1], [70, 1, 1, 78]):
        torch.testing.assert_close(
            run(memory_of(sizes), q, k, v, calls), expected, atol=1e-6, rtol=0
        )


def dense(q, k, v, window):
    """Full attention in which everything outside the window is `window` - 1 tokens away."""
    n = q.shape[2]
    positions = np.arange(n)
    near = rotated(q.numpy(), positions) @ rotated(
        np.repeat(k.numpy(), H // G, 1), positions
    ).swapaxes(2, 3)
    far = rotated(q.numpy(), window - 1) @ np.repeat(k.numpy(), H // G, 1).swapaxes(2, 3)
    distance = positions[:, None] - positions
    logits = torch.tensor(np.where(distance < window, near, far) * D**-0.5)
    logits.masked_fill_(torch.tensor(distance < 0), -torch.inf)
    return torch.softmax(logits, -1) @ v.repeat_interleave(H // G, 1)


@pytest.mark.parametrize("chunk", [1, 7, 16, 24])
def test_all_blocks_looked_up_is_full_attention_with_capped_distances(chunk):
    q, k, v = tensors(180)
    sizes = MemorySettings(5, 24, 8, 1000, 2, chunk, True)
    found = run(memory_of(sizes), q, k, v, [100, 1, 79])
    torch.testing.assert_close(found, dense(q, k, v, 24), atol=1e-6, rtol=0)


def test_pieces_that_are_multiples_of_the_chunk_change_nothing():
    q, k, v = tensors(210)
    whole = run(memory_of(SIZES), q, k, v, [210])
    pieces = run(memory_of(SIZES), q, k, v, [48, 16, 96, 50])
    assert torch.equal(whole, pieces)


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("capacity", [0, 1, 3, 100])
def test_where_blocks_are_kept_and_how_many_are_cached_changes_no_bit(offload, capacity, tmp_path):
    q, k, v = tensors(300, dtype=torch.float32)
    calls = [250] + [1] * 50
    expected = run(memory_of(SIZES), q, k, v, calls)
    store = BlockStore(offload, tmp_path, capacity)
    memory = memory_of(SIZES, store)
    assert torch.equal(run(memory, q, k, v, calls), expected)
    assert store.cached <= capacity
    assert store.misses > 10
    assert memory.n_blocks == 33


def test_sequences_of_a_batch_know_nothing_of_each_other():
    q, k, v = tensors(150, n_units=3)
    memory = memory_of(SIZES)
    together = run(memory, q, k, v, [140] + [1] * 10)
    for unit in range(3):
        lone = memory_of(SIZES)
        alone = run(lone, *(x[unit : unit + 1] for x in (q, k, v)), [140] + [1] * 10)
        torch.testing.assert_close(together[unit : unit + 1], alone, atol=1e-6, rtol=0)
        assert memory.chosen[unit] == lone.chosen[0]
    assert memory.chosen[0] != memory.chosen[1]  # else nothing was tested


def test_reordered_sequences_go_on_from_where_they_came_from():
    q, k, v = tensors(160, n_units=2)
    expected = run(memory_of(SIZES), q, k, v, [140] + [1] * 20)[:, :, 140:]
    memory = memory_of(SIZES)
    run(memory, *(x[:, :, :140] for x in (q, k, v)), [140])
    memory.reorder_cache(torch.tensor([1, 0, 1]))
    assert memory.batch_size == 3
    picks = [x[[1, 0, 1], :, 140:] for x in (q, k, v)]
    torch.testing.assert_close(
        run(memory, *picks, [1] * 20), expected[[1, 0, 1]], atol=1e-6, rtol=0
    )


def test_a_copy_goes_on_by_itself():
    q, k, v = tensors(200)
    memory = memory_of(SIZES)
    run(memory, *(x[:, :, :150] for x in (q, k, v)), [150])
    twin = memory.copied(memory.store.fork())
    rest = [x[:, :, 150:] for x in (q, k, v)]
    other = [x.flip(2) for x in rest]
    run(twin, *other, [50])
    expected = run(memory_of(SIZES), q, k, v, [150] + [1] * 50)[:, :, 150:]
    torch.testing.assert_close(run(memory, *rest, [1] * 50), expected, atol=1e-6, rtol=0)
    assert twin.length == memory.length == 200


def test_a_sliding_layer_keeps_its_window_and_nothing_else():
    q, k, v = tensors(150)
    sizes = MemorySettings(4, 100, 8, 2, 2, 50, True)
    memory = memory_of(sizes, sliding_window=20)
    found = run(memory, q, k, v, [120] + [1] * 30)
    positions = np.arange(150)
    turned = [torch.tensor(rotated(x.numpy(), positions)) for x in (q, k)]
    distance = torch.arange(150)[:, None] - torch.arange(150)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *turned, v, attn_mask=(distance >= 0) & (distance < 20), enable_gqa=True
    )
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert memory.n_blocks == 0
    assert memory.state()["recent"].shape[3] == 20


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 5e-3)])
def test_half_precision_stays_near_single(dtype, tolerance):
    sizes = MemorySettings(4, 32, 8, 1000, 2, 16, True)  # no choice that rounding could turn
    q, k, v = tensors(150)
    expected = run(memory_of(sizes), q, k, v, [150])
    found = run(memory_of(sizes), *(x.to(dtype) for x in (q, k, v)), [150])
    assert found.dtype == dtype
    assert (found - expected).abs().max() < tolerance


def test_memory_on_the_device_stops_growing():
    memory = memory_of(SIZES)
    q, k, v = tensors(2000, dtype=torch.float32)
    run(memory, *(x[:, :, :500] for x in (q, k, v)), [500])
    before, blocks = memory.resident_bytes(), memory.n_blocks
    run(memory, *(x[:, :, 500:] for x in (q, k, v)), [1500])
    assert memory.n_blocks - blocks in (1500 // 8, 1500 // 8 + 1)
    # Only representatives are added, in a table with up to half of its length to spare.
    assert memory.resident_bytes() - before <= H * D * 4 * 1.5 * memory.n_blocks
    assert memory.resident_bytes() < 2000 * 2 * G * D * 4 / 3  # of all keys and values


def test_spans_name_the_tokens_of_the_blocks():
    q, k, v = tensors(200)
    memory = memory_of(SIZES)
    run(memory, q, k, v, [199, 1])
    for block, (start, end) in zip(memory.chosen[0], memory.spans()[0], strict=True):
        assert (start, end) == (4 + 8 * block, 12 + 8 * block)
        stored = memory.store.get(memory.handles[0][block], CPU)
        assert torch.equal(stored[0], k[0, :, start:end])
        assert torch.equal(stored[1], v[0, :, start:end])


def test_another_number_of_sequences_is_refused():
    memory = memory_of(SIZES)
    memory.attend(*tensors(10, n_units=2))
    with pytest.raises(DataError, match="2 sequences and was given 1"):
        memory.attend(*tensors(10))


def test_tokens_cannot_be_taken_back():
    with pytest.raises(DataError, match="without an assistant"):
        memory_of(SIZES).crop(-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exec_chunk": 33}, r"exec_chunk .*n_local \(32\).*got 33"),
        ({"repr_topk": 9}, r"repr_topk .*block_size \(8\), got 9"),
        ({"n_init": -1}, "n_init must be 0 or more, got -1"),
        ({"topk": 1.5}, "topk must be a whole number, got 1.5"),
        ({"block_size": 0}, "block_size must be 1 or more"),
        ({"n_local": True}, "n_local must be a whole number"),
    ],
)
def test_sizes_out_of_range_are_refused(changes, message):
    from dataclasses import replace

    with pytest.raises(DataError, match=message):
        replace(SIZES, **changes).checked()


# Where blocks are kept ----------------------------------------------------------------------------


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_blocks_come_back_bit_by_bit(offload, dtype, tmp_path):
    store = BlockStore(offload, tmp_path, 2)
    blocks = [torch.randn(2, 3, 4 + i, 5).to(dtype) for i in range(6)]
    handles = []
    for block in blocks:
        given_away = block.clone()
        handles.append(store.append(given_away))
        given_away.zero_()  # the store has a copy
    for index in (0, 5, 0, 3, 2, 1, 4, 4, 0):
        found = store.get(handles[index], CPU)
        assert found.dtype == dtype
        assert torch.equal(found, blocks[index])


@settings(max_examples=50, deadline=None)
@given(capacity=st.integers(0, 5), asked=st.lists(st.integers(0, 7), min_size=1, max_size=40))
def test_the_least_recently_used_block_goes_first(capacity, asked):
    store = BlockStore("cpu", max_cached_blocks=capacity)
    handles = [store.append(torch.full((3,), float(i))) for i in range(8)]
    model, hits = OrderedDict(), 0
    for index in asked:
        assert store.get(handles[index], CPU).tolist() == [index] * 3
        hits += index in model
        model.pop(index, None)
        model[index] = True
        while len(model) > capacity:
            model.popitem(last=False)
    assert (store.hits, store.misses) == (hits, len(asked) - hits)
    assert store.cached == len(model)


def test_places_of_evicted_blocks_are_used_again(tmp_path):
    store = BlockStore("disk", tmp_path, 3)
    handles = [store.append(torch.full((4,), float(i))) for i in range(9)]
    places = set()
    for index in [*range(9), *range(9)]:
        block = store.get(handles[index], CPU)
        assert block.tolist() == [index] * 4
        places.add(block.data_ptr())
    assert len(places) == 3
    # Blocks of another kind do not mix with them.
    wide = store.append(torch.full((2, 4), 9.0).double())
    for index in (8, 7, 6, 5):
        assert store.get(wide, CPU).tolist() == [[9] * 4] * 2
        assert store.get(handles[index], CPU).tolist() == [index] * 4
    assert store.cached == 3


def test_forks_share_old_blocks_and_add_their_own(tmp_path):
    store = BlockStore("disk", tmp_path, 1)
    old = store.append(torch.ones(4))
    fork = store.fork()
    mine, theirs = store.append(torch.full((4,), 2.0)), fork.append(torch.full((4,), 3.0))
    assert [fork.get(h, CPU)[0].item() for h in (old, mine, theirs)] == [1, 2, 3]
    assert [store.get(h, CPU)[0].item() for h in (old, mine, theirs)] == [1, 2, 3]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_a_file_is_closed_and_nameless(tmp_path):
    def count():
        return len(os.listdir("/proc/self/fd"))

    before = count()
    store = BlockStore("disk", tmp_path, 0)
    handles = [store.append(torch.ones(1000)) for _ in range(3)]
    assert count() == before + 1
    assert os.listdir(tmp_path) == []
    store.clear()
    assert store.get(handles[2], CPU).sum() == 1000  # handles keep it
    del handles
    assert count() == before


@contextlib.contextmanager
def files_no_larger_than(n_bytes):
    """Let the system refuse to write more than that, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(sys.platform == "win32", reason="limits file sizes with POSIX calls")
def test_a_full_disk_is_named_and_loses_nothing(tmp_path):
    store = BlockStore("disk", tmp_path, 0)
    first = store.append(torch.full((1000,), 1.0))
    with files_no_larger_than(6000):
        with pytest.raises(CacheError, match=r"8,000 bytes.*offload_folder.*offload='cpu'") as e:
            store.append(torch.full((1000,), 2.0))
        assert str(tmp_path) in str(e.value)
    assert store.get(first, CPU).sum() == 1000
    third = store.append(torch.full((1000,), 3.0))  # there is space again
    assert store.get(third, CPU).sum() == 3000


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="file"):
        BlockStore("disk", tmp_path / "file")
    with pytest.raises(DataError, match="needs a folder"):
        BlockStore("disk")
    with pytest.raises(DataError, match="offload must be one of none, cpu, disk, got 'gpu'"):
        BlockStore("gpu")
    with pytest.raises(DataError, match="max_cached_blocks must be 0 or more, got -1"):
        BlockStore("cpu", max_cached_blocks=-1)


# Files --------------------------------------------------------------------------------------------


def test_written_files_are_what_safetensors_reads(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file

    rows = [torch.randn(2, 3) for _ in range(5)]
    expected = {
        "rows": torch.stack(rows),
        "half": torch.randn(3, 2).to(torch.bfloat16),
        "ids": torch.arange(7),
        "none": torch.empty(1, 0, 4),
    }
    path = tmp_path / "x.safetensors"
    sources = [TensorSource.of(n, t) for n, t in expected.items() if n != "rows"]
    sources.insert(1, TensorSource("rows", torch.float32, (5, 2, 3), iter(rows)))
    write_safetensors(path, sources)
    found = load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    segment = SavedSegment(safe_open(path, framework="pt"), "rows")
    store = BlockStore("disk", tmp_path)
    for index in (3, 0, 4):
        assert torch.equal(store.get(BlockHandle(segment, index), CPU), rows[index])


def test_pieces_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(DataError, match="rows do not fill its shape"):
        write_safetensors(path, [TensorSource("rows", torch.float32, (2, 3), [torch.ones(3)])])
    with pytest.raises(DataError, match=r"float64, not torch\.float32"):
        write_safetensors(
            path, [TensorSource("rows", torch.float32, (1,), [torch.ones(1).double()])]
        )


@pytest.mark.skipif(sys.platform == "win32", reason="limits file sizes with POSIX calls")
def test_a_full_disk_while_saving_is_named(tmp_path):
    with (
        files_no_larger_than(1000),
        pytest.raises(CacheError, match=r"x\.safetensors.*needs 40,000 bytes"),
    ):
        write_safetensors(tmp_path / "x.safetensors", [TensorSource.of("x", torch.zeros(10_000))])
