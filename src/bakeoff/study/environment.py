"""Facts about the machine and the installed packages, for the record beside every result."""

from __future__ import annotations

import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from bakeoff import __version__
from bakeoff.study.executors import available_cores

PACKAGES = (
    "accelerate",
    "datasets",
    "duckdb",
    "numpy",
    "peft",
    "pyarrow",
    "ray",
    "safetensors",
    "scikit-learn",
    "scipy",
    "sentence-transformers",
    "statsmodels",
    "tokenizers",
    "torch",
    "transformers",
)
"""Packages whose versions can change a score or a cost; those not installed are left out."""


def environment() -> dict[str, Any]:
    """Return what a result depends on besides its inputs.

    Nothing is imported to find a version: package metadata is read instead.

    Returns
    -------
    dict
        ``bakeoff``, ``python``, ``platform``, ``processor`` (None if unknown), ``cores`` (those
        this process may use), ``memory_bytes`` and ``packages`` (version by name).

    Examples
    --------
    >>> sorted(environment())
    ['bakeoff', 'cores', 'memory_bytes', 'packages', 'platform', 'processor', 'python']
    """
    import psutil

    return {
        "bakeoff": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": available_cores(),
        "memory_bytes": int(psutil.virtual_memory().total),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str | None:
    # `platform.processor()` is empty or just the architecture on most Linux machines.
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        match = None
    if match:
        return match[1].strip()
    return platform.processor() or platform.machine() or None
