import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pytest

import bakeoff
from bakeoff.errors import StoreError
from bakeoff.study.design import Design
from bakeoff.study.store import SCHEMA_VERSION, Run, Store, TrialKey

RUN = Run("2026-01-01T00:00:00", 1.5, "2026-01-01T00:00:01")


def key(seed=0, **changes):
    parts = {"problem": "f1", "design": Design("a", "m", {"k": 1}), "method_version": "1"}
    return TrialKey(**(parts | {"seed": seed} | changes))


def scores(seed, n_tasks=2):
    rng = np.random.default_rng(seed)
    return {"hit": {f"task {i}": rng.normal(size=5 + i) for i in range(n_tasks)}}


def finish(store, trial, files=True, artifact=True):
    scratch = store.scratch(trial.id)
    scratch.mkdir()
    if files:
        (scratch / "model").mkdir()
        (scratch / "model" / "weights").write_text(f"{trial.seed}")
    return store.finish(
        trial,
        scores(trial.seed),
        cost={"wall_seconds": 0.5},
        notes=["note"],
        scratch=scratch,
        artifact=scratch / "model" if files and artifact else None,
        run=RUN,
    )


def files_below(directory):
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


def test_id_depends_on_what_is_run_and_not_on_the_display_name():
    same = key(design=Design("other name", "m", {"k": 1}))
    assert same.id == key().id
    others = [
        key(seed=1),
        key(problem="f2"),
        key(method_version="2"),
        key(design=Design("a", "n", {"k": 1})),
        key(design=Design("a", "m", {"k": 2})),
    ]
    assert len({key().id, *(other.id for other in others)}) == 6


def test_what_was_recorded_comes_back_exactly(tmp_path):
    with Store(tmp_path) as store:
        recorded = [finish(store, key(seed)) for seed in range(3)]
        failed = store.fail(
            key(9), error="E: x", traceback="long", scratch=store.scratch(key(9).id), run=RUN
        )
    with Store(tmp_path) as store:
        found = store.trials("f1")
        assert found == {trial.id: trial for trial in [*recorded, failed]}
        assert store.trials("f2") == {}
        for seed, units in ((s, store.scores([key(s).id])[key(s).id]) for s in range(3)):
            for task, values in scores(seed)["hit"].items():
                np.testing.assert_array_equal(units["hit"][task], values)
        trial = found[key(1).id]
        assert trial.artifact == f"trials/{trial.id}/model"
        assert (tmp_path / trial.artifact / "weights").read_text() == "1"
        assert trial.shape == {"hit": {"task 0": 5, "task 1": 6}}
        assert trial.summary["hit"]["task 0"][1] == scores(1)["hit"]["task 0"].mean()


def test_a_failed_trial_is_replaced_when_it_finishes(tmp_path):
    with Store(tmp_path) as store:
        store.fail(key(), error="E", traceback="t", scratch=store.scratch(key().id), run=RUN)
        finish(store, key())
        assert [t.status for t in store.trials("f1").values()] == ["finished"]
        assert list(store.scores([key().id])) == [key().id]


def test_a_trial_that_leaves_no_files_leaves_no_folder(tmp_path):
    with Store(tmp_path) as store:
        finish(store, key(), files=False)
        assert list((tmp_path / "trials").iterdir()) == []


def test_unit_scores_move_to_parquet_and_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr("bakeoff.study.store._TRIALS_PER_FILE", 4)
    keys = [key(seed) for seed in range(11)]
    with Store(tmp_path) as store:
        for one in keys[:6]:
            finish(store, one, files=False)
    with Store(tmp_path) as store:  # the two that wait in the database count in the next session
        for one in keys[6:]:
            finish(store, one, files=False)
        found = store.scores([one.id for one in keys])
        store.flush()
        flushed = store.scores([one.id for one in keys])
        store.flush()  # nothing to do
    assert len(list((tmp_path / "units").iterdir())) == 3
    for one in keys:
        for scored in (found, flushed):
            for task, values in scores(one.seed)["hit"].items():
                np.testing.assert_array_equal(scored[one.id]["hit"][task], values)
    everything = f"SELECT count(DISTINCT trial) FROM '{tmp_path}/units/*.parquet'"
    assert duckdb.connect().execute(everything).fetchall() == [(11,)]


def test_large_unit_scores_move_sooner(tmp_path, monkeypatch):
    with Store(tmp_path) as store:
        finish(store, key(0), files=False)
        assert list((tmp_path / "units").iterdir()) == []
        monkeypatch.setattr("bakeoff.study.store._BYTES_PER_FILE", store._pending_bytes + 1)
    with Store(tmp_path) as store:
        finish(store, key(1), files=False)
        assert units_file(tmp_path)


def units_file(directory):
    (file,) = (directory / "units").glob("*.parquet")
    return file


def test_rubbish_of_a_killed_run_is_swept_out_and_the_rest_stays(tmp_path):
    with Store(tmp_path) as store:
        finish(store, key(0))
        store.flush()
    kept = units_file(tmp_path).name
    other = key(1).id
    (tmp_path / "units" / f"{'0' * 16}.parquet").write_bytes(b"unrecorded")
    (tmp_path / "units" / f"{'1' * 16}.parquet.part").write_bytes(b"half")
    (tmp_path / "trials" / other / "deep").mkdir(parents=True)
    (tmp_path / "trials" / f"{key(0).id}.{'a' * 8}.part").mkdir()
    (tmp_path / "trials" / f"shared.{'a' * 8}.part").mkdir()
    for path in (tmp_path / "units" / "my notes.txt", tmp_path / "trials" / "mine"):
        path.write_text("not bakeoff's")
    with Store(tmp_path) as store:
        assert store.forgotten == 0
        assert list(store.scores([key(0).id])) == [key(0).id]
    assert set(files_below(tmp_path)) - {"lock", "study.duckdb"} == {
        "trials/mine",
        "units/my notes.txt",
        f"units/{kept}",
        f"trials/{key(0).id}/model/weights",
    }
    assert len(list((tmp_path / "trials").iterdir())) == 2


def test_half_a_new_database_is_no_obstacle(tmp_path):
    for name in (".study.duckdb.part", ".study.duckdb.part.wal"):
        (tmp_path / name).write_bytes(b"half")
    Store(tmp_path).close()
    assert files_below(tmp_path) == ["lock", "study.duckdb"]


def test_trials_whose_unit_scores_vanished_are_forgotten(tmp_path):
    with Store(tmp_path) as store:
        finish(store, key(0))
        finish(store, key(1))
        store.flush()
        finish(store, key(2))
    units_file(tmp_path).unlink()
    with Store(tmp_path) as store:
        assert store.forgotten == 2
        assert list(store.trials("f1")) == [key(2).id]
        finish(store, key(0))


def test_damaged_unit_scores_are_named(tmp_path):
    with Store(tmp_path) as store:
        finish(store, key(0))
        store.flush()
        path = units_file(tmp_path)
        path.write_bytes(path.read_bytes()[:40])
        with pytest.raises(StoreError, match=rf"{path.name} is damaged .*delete it"):
            store.scores([key(0).id])


def test_shared_cost_adds_time_and_keeps_the_highest_memory(tmp_path):
    with Store(tmp_path) as store:
        assert store.shared_cost("f1") == {"wall_seconds": 0.0, "peak_memory_bytes": 0.0}
        store.add_shared_cost("f1", 2.0, 100.0)
        store.add_shared_cost("f1", 1.0, 70.0)
    with Store(tmp_path) as store:
        assert store.shared_cost("f1") == {"wall_seconds": 3.0, "peak_memory_bytes": 100.0}


def test_a_store_of_another_version_is_refused_with_both_versions(tmp_path):
    Store(tmp_path).close()
    with duckdb.connect(str(tmp_path / "study.duckdb")) as connection:
        connection.execute("UPDATE meta SET value = '99' WHERE key = 'schema_version'")
        connection.execute("UPDATE meta SET value = '7.8' WHERE key = 'bakeoff_version'")
    before = (tmp_path / "study.duckdb").read_bytes()
    with pytest.raises(StoreError) as caught:
        Store(tmp_path)
    for part in ("99", "7.8", bakeoff.__version__, f"store version {SCHEMA_VERSION}"):
        assert part in str(caught.value)
    assert (tmp_path / "study.duckdb").read_bytes() == before


def test_somebody_elses_database_is_refused(tmp_path):
    with duckdb.connect(str(tmp_path / "study.duckdb")) as connection:
        connection.execute("CREATE TABLE birds (name VARCHAR)")
    with pytest.raises(StoreError, match="not a bakeoff store"):
        Store(tmp_path)


@pytest.mark.parametrize("damage", ["empty", "garbage", "cut"])
def test_a_damaged_database_is_named_and_kept(tmp_path, damage):
    Store(tmp_path).close()
    path = tmp_path / "study.duckdb"
    whole = path.read_bytes()
    rubbish = np.random.default_rng(0).bytes(9000)
    path.write_bytes({"empty": b"", "garbage": rubbish, "cut": whole[: len(whole) // 2]}[damage])
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"study\.duckdb is damaged.*the file is kept"):
        Store(tmp_path)
    assert path.read_bytes() == before
    path.write_bytes(whole)  # and the lock was let go
    Store(tmp_path).close()


def test_a_database_with_a_bad_block_is_a_store_error(tmp_path):
    with Store(tmp_path) as store:
        for seed in range(40):
            finish(store, key(seed), files=False)
    path = tmp_path / "study.duckdb"
    data = bytearray(path.read_bytes())
    for place in range(3 * 4096, len(data), 997):  # behind the three headers
        data[place] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(StoreError, match="file is kept"), Store(tmp_path) as store:
        store.trials("f1")
    assert path.exists()


def test_a_database_open_in_another_program_is_named(tmp_path):
    Store(tmp_path).close()
    code = "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print('open', flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / "study.duckdb")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(StoreError, match="open in another program"):
            Store(tmp_path)
        other.communicate("\n")


def test_a_second_store_is_refused_at_once_and_names_the_holder(tmp_path):
    with Store(tmp_path), pytest.raises(StoreError, match=rf"process {os.getpid()}\)"):
        Store(tmp_path)
    Store(tmp_path).close()


def test_the_lock_dies_with_its_process_and_a_stale_file_is_no_obstacle(tmp_path):
    code = (
        "import sys; from bakeoff.study.store import Store\n"
        "store = Store(sys.argv[1]); print('open', flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(StoreError, match=rf"process {other.pid}\)"):
            Store(tmp_path)
        other.send_signal(signal.SIGKILL)
    assert (tmp_path / "lock").read_text() == str(other.pid)
    with Store(tmp_path):
        assert (tmp_path / "lock").read_text() == str(os.getpid())


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"study directory .*file/out cannot be made"):
        Store(tmp_path / "file" / "out")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_named(tmp_path):
    Store(tmp_path).close()
    (tmp_path / "lock").chmod(0o400)
    with pytest.raises(StoreError, match="cannot be written"):
        Store(tmp_path)


def test_a_full_disk_is_a_store_error_and_nothing_recorded_is_lost(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with Store(tmp_path) as store:
        finish(store, key(0))
        monkeypatch.setattr("pyarrow.parquet.write_table", full)
        with pytest.raises(StoreError, match="No space left"):
            store.flush()
        monkeypatch.setattr(Path, "rename", full)
        with pytest.raises(StoreError, match="trials are kept"):
            finish(store, key(1))
        monkeypatch.undo()
    with Store(tmp_path) as store:
        assert list(store.scores([key(0).id, key(1).id])) == [key(0).id]
        assert [path.name for path in (tmp_path / "trials").iterdir()] == [key(0).id]
        store.flush()


def test_a_log_torn_at_any_byte_costs_only_the_last_trials(tmp_path):
    """A power cut can tear DuckDB's write-ahead log; whatever is left must open and agree."""
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[2]); import test_store as t\n"
        "store = t.Store(sys.argv[1])\n"
        "for seed in range(6): t.finish(store, t.key(seed), files=False)\n"
        "os.kill(os.getpid(), 9)"
    )
    killed = tmp_path / "killed"
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", code, str(killed), here], check=False)
    log = (killed / "study.duckdb.wal").read_bytes()
    counts = []
    for n_bytes in np.linspace(0, len(log), 25).astype(int):
        torn = tmp_path / f"torn {n_bytes}"
        shutil.copytree(killed, torn)
        (torn / "study.duckdb.wal").write_bytes(log[:n_bytes])
        with Store(torn) as store:
            found = store.trials("f1")
            assert set(store.scores(found)) == set(found) == {key(s).id for s in range(len(found))}
            counts.append(len(found))
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 6)
