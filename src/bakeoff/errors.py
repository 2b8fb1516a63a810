"""The exceptions bakeoff raises.

Every one is also a built-in exception (`ValueError`, `RuntimeError`, ...), so callers can catch
either. The command line turns a `BakeoffError` into one readable line and an exit code; anything
else is a bug and shows its traceback.
"""

from __future__ import annotations


class BakeoffError(Exception):
    """Base class of all errors that a user can mend; the message says how."""


class DataError(BakeoffError, ValueError):
    """The user's data cannot be used as given; names the file, column or row, and what can be."""


class ModelError(BakeoffError, ValueError):
    """A base model is unknown, absent, or cannot serve the purpose it was asked for."""


class FetchError(BakeoffError, RuntimeError):
    """A download failed or its SHA-256 is not the recorded one."""


class StoreError(BakeoffError, RuntimeError):
    """A study directory or vector store is in use, damaged, or written by another version."""


class CacheError(BakeoffError, OSError):
    """The cache directory is read-only, full, or otherwise unusable."""
