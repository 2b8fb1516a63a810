"""A sentence-transformers model by name, with the fingerprint that its vectors are kept under."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bakeoff._files import sha256
from bakeoff.errors import BakeoffError, ModelError
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
        If there is no such model, or it cannot be loaded, e.g. because it needs code of its own.

    Notes
    -----
    ``SentenceTransformer`` asks for ``trust_remote_code=True`` before it loads a module that is not
    its own, and then runs whatever a folder brings along. Here modules of this package are taken
    from where it is installed, and no code of a folder is run.

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
                if not self._has_modules_of_ours():
                    return SentenceTransformer(
                        str(self.folder), model_kwargs={"use_safetensors": True}
                    )
                entries = self._settings("modules.json")
                modules = [_loaded_module(self.folder, entry) for entry in entries]
            known = ("prompts", "default_prompt_name", "similarity_fn_name")
            settings = self._settings("config_sentence_transformers.json")
            return SentenceTransformer(
                modules=modules, **{name: settings.get(name) for name in known}
            )
        except BakeoffError:
            raise
        except Exception as error:  # a damaged folder fails in as many ways as it has readers
            raise ModelError(
                f"{self.name} cannot be loaded by sentence-transformers: {one_line(error)}"
            ) from error

    def _has_modules_of_ours(self) -> bool:
        entries = self._settings("modules.json") if self.is_sentence_transformer else []
        return any(entry["type"].startswith("bakeoff.") for entry in entries)

    def _settings(self, file: str) -> Any:
        path = self.folder / file
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}

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


def load_encoder(name: str | Path) -> SentenceTransformer:
    """Return a text encoder by name, ours included, without running code of a folder.

    Parameters
    ----------
    name
        As for `TextEncoder`, which this loads.

    Raises
    ------
    ModelError
        If there is no such model, or it cannot be loaded.

    Examples
    --------
    >>> load_encoder("winner/").encode(["a text"]).shape  # doctest: +SKIP
    (1, 576)
    """
    return TextEncoder(name).model


def _loaded_module(folder: Path, entry: dict[str, str]) -> Any:
    """Return one module of a sentence-transformers folder: theirs or ours."""
    from sentence_transformers.base.modules.module import Module

    path = entry["path"]
    package, _, name = entry["type"].rpartition(".")
    if not package.startswith(("sentence_transformers.", "bakeoff.")):
        raise ModelError(f"{folder} needs {entry['type']}, code of others, which is never run here")
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise ModelError(f"{folder}: the module {path!r} lies outside of the folder")
    # An absolute import: a file of that name inside the folder is not looked at.
    kind: Any = getattr(importlib.import_module(package), name, None)
    if not isinstance(kind, type) or not issubclass(kind, Module):
        raise ModelError(f"{folder}: {entry['type']} is no module of sentence-transformers")
    return kind.load(  # type: ignore[attr-defined]
        str(folder),
        subfolder=path,
        local_files_only=True,
        trust_remote_code=False,
        model_kwargs={"use_safetensors": True},
    )
