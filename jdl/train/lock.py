"""One process trains in a run directory at a time."""

import fcntl
import os
from pathlib import Path

from jdl.core import check


class RunLock:
    """Held while a process trains in a directory; the system lets go of it when the process dies.

    Raises:
      UserError: on entering, where another process holds it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory, RunLock(directory):
    ...     try:
    ...         RunLock(directory).__enter__()
    ...     except check.UserError as error:
    ...         print("refused")
    refused
    """

    def __init__(self, directory: str | Path):
        self._directory = Path(directory)
        self._descriptor: int | None = None

    def __enter__(self) -> "RunLock":
        self._directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise check.UserError(
                f"Process {holder} is training in {self._directory} already. Wait for it to end, "
                "or choose another work directory."
            ) from None
        except OSError:  # a file system without locks: nothing to hold on to
            pass
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._descriptor = descriptor
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
