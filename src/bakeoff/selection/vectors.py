"""Vectors of a pool, embedded once and kept in the cache under what they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bakeoff._files import cache_directory
from bakeoff.data.vector_store import VectorStore


def cached_vectors(
    texts: Sequence[str],
    embed: Callable[[list[str]], NDArray[np.float32]],
    fingerprint: Mapping[str, object],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:
    """Return one vector per text ``(n, d)``, from the cache where they were made before.

    Parameters
    ----------
    texts
        n texts.
    embed
        Makes vectors of what is missing.
    fingerprint
        What they depend on besides the texts, in values that JSON knows.
    progress
        Called with (texts done, texts in total).
    """
    digest = hashlib.sha256(json.dumps(dict(fingerprint), sort_keys=True).encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    folder = cache_directory() / "vectors" / digest.hexdigest()[:32]
    store = VectorStore.build(
        folder,
        texts,
        embed,
        fingerprint=fingerprint,
        rows_per_shard=1024,
        progress=progress,
        wait=True,
    )
    return np.asarray(store)
