"""`bakeoff doctor`: what is here, what is missing, and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from typing import Any

import typer
from packaging.requirements import Requirement

from bakeoff._files import cache_directory
from bakeoff.errors import CacheError


def doctor(*, as_json: bool) -> None:
    """Print the state of the installation; exit code 3 if something needed is missing."""
    facts = examine()
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
    else:
        for check in facts["checks"]:
            mark = {"ok": "ok     ", "optional": "absent ", "missing": "MISSING"}[check["state"]]
            typer.echo(f"{mark}  {check['what']}: {check['found']}")
            if check["mend"]:
                typer.echo(f"         mend: {check['mend']}")
    if any(check["state"] == "missing" for check in facts["checks"]):
        raise typer.Exit(3)


def examine() -> dict[str, Any]:
    """Return all checks as JSON-able records: what, state, found, mend."""
    checks = [_python(), *_packages(), _cache(), *_models(), _data(), _browser()]
    return {"platform": platform.platform(), "checks": checks}


def _check(what: str, state: str, found: str, mend: str | None = None) -> dict[str, str | None]:
    return {"what": what, "state": state, "found": found, "mend": mend}


def _python() -> dict[str, str | None]:
    # An older Python cannot have installed the package, so there is nothing to compare.
    return _check("Python", "ok", platform.python_version())


def _packages() -> list[dict[str, str | None]]:
    checks = []
    for text in importlib.metadata.requires("bakeoff") or []:
        requirement = Requirement(text)
        extra = _extra_of(requirement)
        if extra in {"dev", "docs"}:
            continue
        what = requirement.name + (f" (extra {extra!r})" if extra else "")
        mend = f'pip install "bakeoff[{extra}]"' if extra else f'pip install "{requirement.name}"'
        absent = "optional" if extra else "missing"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            checks.append(_check(what, absent, "not installed", mend))
            continue
        if requirement.specifier.contains(version, prereleases=True):
            checks.append(_check(what, "ok", version))
        else:
            wanted = f"{version}, needed {requirement.specifier}"
            mend = f'pip install "{requirement.name}{requirement.specifier}"'
            checks.append(_check(what, absent, wanted, mend))
    return checks


def _extra_of(requirement: Requirement) -> str | None:
    if requirement.marker is None:
        return None
    for extra in ("onnx", "ray", "peers", "docs", "dev"):
        if requirement.marker.evaluate({"extra": extra}) and not requirement.marker.evaluate(
            {"extra": ""}
        ):
            return extra
    return None


def _cache() -> dict[str, str | None]:
    try:
        directory = cache_directory()
    except CacheError as error:
        return _check("cache", "missing", str(error), "export BAKEOFF_CACHE=/a/writable/folder")
    free = shutil.disk_usage(directory).free / 2**30
    if free < 3:
        return _check(
            "cache",
            "missing",
            f"{directory}, {free:.1f} GiB free, 3 are needed",
            "export BAKEOFF_CACHE=/a/larger/folder",
        )
    return _check("cache", "ok", f"{directory}, {free:.0f} GiB free")


def _models() -> list[dict[str, str | None]]:
    from bakeoff.models import available

    return [
        _check(f"model {model.name}", "ok", str(model.path))
        if model.present
        else _check(f"model {model.name}", "optional", f"not fetched ({model.size})", model.command)
        for model in available()
    ]


def _data() -> dict[str, str | None]:
    from bakeoff.data.embedded import embedded_is_present

    if embedded_is_present():
        return _check("default data", "ok", "in the cache")
    return _check("default data", "optional", "not fetched (28 MB download)", "bakeoff run")


def _browser() -> dict[str, str | None]:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path:
        return _check("browser for report tests", "ok", path)
    return _check("browser for report tests", "optional", "no chromium", "apt-get install chromium")
