"""One process trains in a run directory at a time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import lock_descriptor

from jdl.core import check


@contextmanager
def run_lock(directory: str | Path) -> Iterator[None]:
    """Held while a process trains in a directory; the system frees it when the process dies.

    Args:
      directory: it is made if need be.

    Raises:
      UserError: another process holds it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory, run_lock(directory):
    ...     try:
    ...         with run_lock(directory):
    ...             pass
    ...     except check.UserError as error:
    ...         print("refused")
    refused
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(Path(directory) / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            free = lock_descriptor(descriptor, blocking=False)
        except OSError:  # a file system without locks
            free = True
        # The holder's number starts at the second byte: on Windows the locked first is unreadable.
        os.lseek(descriptor, 1, os.SEEK_SET)
        if not free:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            raise check.UserError(
                f"Process {holder} is training in {directory} already. Wait for it to end, or "
                "choose another work directory."
            )
        os.ftruncate(descriptor, 1)
        os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        os.close(descriptor)
