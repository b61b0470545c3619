"""One process trains in a run directory at a time."""

import os
from pathlib import Path

from filelock import lock_descriptor

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
        # The holder's number starts at the second byte: Windows lets nobody read the locked first.
        os.lseek(descriptor, 1, os.SEEK_SET)
        try:
            free = lock_descriptor(descriptor, blocking=False)
        except OSError:  # a file system without locks: nothing to hold on to
            free = True
        if not free:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise check.UserError(
                f"Process {holder} is training in {self._directory} already. Wait for it to end, "
                "or choose another work directory."
            )
        os.ftruncate(descriptor, 1)
        os.write(descriptor, str(os.getpid()).encode())
        self._descriptor = descriptor
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
