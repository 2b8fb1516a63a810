"""A sentence-transformers model by name, with the fingerprint that its vectors are kept under."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bakeoff._files import sha256
from bakeoff.errors import ModelError
from bakeoff.models.gguf import one_line, quiet_transformers
from bakeoff.models.loading import model_folder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# Files of a model folder that its vectors do not depend on.
_IGNORED_FOLDERS = (".", "onnx/", "openvino/")
_IGNORED_ENDINGS = (".md", ".bin")


class TextEncoder:
    """Turns texts into vectors; loaded when first asked to, and left behind when pickled.

    Parameters
    ----------
    name
        A packaged model's name, a folder or a hub id. A folder that sentence-transformers did not
        write gives the mean over tokens.

    Raises
    ------
    ModelError
        If there is no such model or sentence-transformers cannot load it.

    Examples
    --------
    >>> encoder = TextEncoder("all-minilm-l6-v2")  # doctest: +SKIP
    >>> encoder.encode(["a text"]).shape  # doctest: +SKIP
    (1, 384)
    """

    def __init__(self, name: str | Path) -> None:
        self.name = str(name)

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name}

    @cached_property
    def folder(self) -> Path:
        """Where the model lies on this machine."""
        return model_folder(self.name)

    @property
    def is_sentence_transformer(self) -> bool:
        """Whether the folder says how tokens become one vector; else they are averaged."""
        return (self.folder / "modules.json").is_file()

    @cached_property
    def fingerprint(self) -> str:
        """64 hexadecimal digits that change with any file that the vectors depend on."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            ignored = name.startswith(_IGNORED_FOLDERS) or name.endswith(_IGNORED_ENDINGS)
            if path.is_file() and not ignored:
                digest.update(f"{name}\n{sha256(path)}\n".encode())
        return digest.hexdigest()

    @cached_property
    def model(self) -> SentenceTransformer:
        """The loaded model."""
        from sentence_transformers import SentenceTransformer

        try:
            with quiet_transformers():
                return SentenceTransformer(str(self.folder), model_kwargs={"use_safetensors": True})
        except Exception as error:  # a damaged folder fails in as many ways as it has readers
            raise ModelError(
                f"{self.name} cannot be loaded by sentence-transformers: {one_line(error)}"
            ) from error

    def encode(
        self,
        texts: Sequence[str],
        *,
        on_truncated: Callable[[list[int]], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> NDArray[np.float32]:
        """Return one vector per text, ``(n, d)``; see `bakeoff.models.encode`."""
        from bakeoff.models.encoding import encode

        return encode(self.model, texts, on_truncated=on_truncated, progress=progress)
