"""Several processes that train together, on JAX's own multi-controller runtime.

Whatever starts the processes (SLURM, Open MPI, Kubernetes, Cloud TPU, a shell) tells them of each
other; `initialize` passes that on to `jax.distributed`, and sees to it that none is left waiting
for one that is gone: a process that fails says so to all, and all end, naming the cause.
"""

import atexit
import os
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import Any

import jax

from jdl.core import check

HEARTBEAT_SECONDS = 10  # a process that gives no sign of life for this long is taken for dead
SHUTDOWN_SECONDS = 8  # how long one that is done waits for the others to be
_FAILURE = "jdl/failure"
_GONE = "process 0, which coordinates, is gone"
_POLL_SECONDS = 0.5


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    expected: int | None = None,
) -> None:
    """Joins this process to the others; to be called before anything else of JAX.

    What is not given is taken from `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID`, else from what JAX detects: SLURM, Open MPI, Kubernetes, Cloud TPU. Where the
    launcher has called `jax.distributed.initialize` itself, as Ray can, its runtime is taken.

    Args:
      coordinator: host:port of process 0.
      num_processes: how many there are.
      process_id: this one's number.
      expected: how many there must be in the end; some launchers start independent copies.

    Raises:
      UserError: the processes do not find each other.
    """
    num_processes = _number("JAX_NUM_PROCESSES", num_processes)
    if not jax.distributed.is_initialized():
        coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
        _join(coordinator, num_processes, _number("JAX_PROCESS_ID", process_id))
    wanted = num_processes if expected is None else expected
    if wanted is not None and jax.process_count() != wanted:
        raise check.UserError(
            f"{wanted} processes were to train together, and JAX sees {jax.process_count()}."
        )
    sys.excepthook = _announcing(sys.excepthook)
    if jax.process_count() > 1:
        done = threading.Event()
        watch = threading.Thread(target=_watch, args=[done], daemon=True, name="jdl-watch")
        watch.start()
        atexit.register(_finish, watch, done)


def _join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    bind = None
    if coordinator is not None and coordinator.rsplit(":", 1)[0] in ("127.0.0.1", "localhost"):
        bind = coordinator  # else it would listen on all interfaces
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            coordinator_bind_address=bind if process_id in (0, None) else None,
        )
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise check.UserError(
            f"The processes do not find each other: {reason} Start them with a launcher that JAX "
            "detects (SLURM, Open MPI 4, Kubernetes, Cloud TPU), or set JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID for each."
        ) from error


def announce(error: BaseException, code: int = 1) -> None:
    """Tells the other processes, if there are any, that this one fails, and ends it at once.

    To wait for them, as JAX does at exit, would leave them waiting for this one in turn.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    told = _failure(wait=2.0)  # what breaks here may be another's failure
    if told is None:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        _tell(f"process {jax.process_index()} failed: {reason}")
        time.sleep(3 * _POLL_SECONDS)  # till the others have heard; process 0 carries the message
    else:
        print(f"jdl: ended, because {told}", file=sys.stderr)
    _leave(code)


def _number(name: str, given: int | None) -> int | None:
    if given is not None or name not in os.environ:
        return given
    text = os.environ[name]
    check.argument(text.isdigit(), name, "a number", text)
    return int(text)


def _announcing(before: Any) -> Any:
    def excepthook(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if jax.process_count() == 1 or isinstance(error, KeyboardInterrupt):
            before(kind, error, trace)
            return
        if isinstance(error, check.UserError):
            print(f"jdl: error: {error}", file=sys.stderr)
        elif _failure(wait=0.0) is None:
            traceback.print_exception(kind, error, trace)
        announce(error)

    return excepthook


def _client() -> Any:
    from jax._src import distributed  # JAX shows its key-value store nowhere else

    return distributed.global_state.client


def _tell(message: str) -> None:
    try:
        _client().key_value_set(_FAILURE, message, allow_overwrite=False)
    except Exception as error:  # process 0, who keeps the store, is gone: nobody is left to tell
        print(f"jdl: could not tell the other processes: {error}", file=sys.stderr)


def _failure(wait: float) -> str | None:
    """What another process said when it failed, if one did within so many seconds."""
    end = time.monotonic() + wait
    while True:
        try:
            return str(_client().key_value_try_get(_FAILURE))
        except Exception as error:
            gone = "NOT_FOUND" not in str(error)
        if gone:
            return _GONE
        if time.monotonic() >= end:
            return None
        time.sleep(0.1)


def _watch(done: threading.Event) -> None:
    """Ends this process when another one has failed, whatever it is waiting for."""
    own = f"process {jax.process_index()} failed"
    while not done.wait(_POLL_SECONDS):
        told = _failure(wait=0.0)
        if told == _GONE:
            done.wait(_POLL_SECONDS)  # in good order perhaps, and this one is about to be
        if done.is_set() or _client() is None:
            return
        if told is not None and not told.startswith(own):
            print(f"jdl: ended, because {told}", file=sys.__stderr__)  # even where that is silenced
            _leave(1)


def _finish(watch: threading.Thread, done: threading.Event) -> None:
    """Leaves together with the others, watched till then.

    A thread that were still asking for failures when Python ends would abort the process.
    """
    try:
        jax.distributed.shutdown()
    finally:
        done.set()
        watch.join(SHUTDOWN_SECONDS)


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
