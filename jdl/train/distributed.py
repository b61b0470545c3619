"""Several processes that train together, on JAX's own multi-controller runtime.

The launcher (SLURM, Open MPI, Kubernetes, Cloud TPU, a shell) gives the processes their
coordinates; `initialize` passes them to `jax.distributed` and starts a watch, so that no process
waits for one that is gone: a process that fails writes the reason to the key-value store of process
0, and all others end with it. JAX alone would end them with a C++ stack trace and no cause.
"""

import atexit
import contextlib
import ctypes
import functools
import itertools
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import jax

from jdl.core import check

HEARTBEAT_SECONDS = 10  # a process without a heartbeat for this long is dead to JAX
SHUTDOWN_SECONDS = 30  # how long a process that has finished waits for the others
INTERRUPTED = 130  # exit code after Ctrl-C
_KEYS = "jdl/"  # in the key-value store of process 0
_FAILURE = "jdl/failure"
_ALIVE = "jdl/alive/"  # + the process's number: a counter that grows while it lives
_COORDINATOR_GONE = "process 0, which coordinates, is gone"
_INTERRUPTED = "was interrupted"
_LEFT = "left"
_POLL_SECONDS = 0.5
_SILENT_SECONDS = 5.0  # a process whose counter stands still for this long may be gone
_LEAVE_SECONDS = 5.0  # how long process 0 waits for the others to leave before it
_lost = threading.Event()  # JAX has lost a process, and does not say which
_ending = threading.Lock()  # held by the thread that ends this process, so that only one prints


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    expected: int | None = None,
) -> None:
    """Joins this process to the others; call it before anything else of JAX.

    Arguments left out come from `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID`, or else from the launcher that JAX detects: SLURM, Open MPI, Kubernetes, Cloud
    TPU. A runtime that the launcher has initialized itself, as Ray can, is used as it is.

    Args:
      coordinator: host:port of process 0.
      num_processes: how many there are.
      process_id: this one's number.
      expected: how many there must be once joined; some launchers start independent copies.

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
        _listen_for_ctrl_c()
        done = threading.Event()
        watch = threading.Thread(target=_watch, args=[done], daemon=True, name="jdl-watch")
        watch.start()
        atexit.register(_finish, watch, done)


def _join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    bind = None
    if coordinator is not None and coordinator.rsplit(":", 1)[0] in ("127.0.0.1", "localhost"):
        bind = coordinator  # else it would listen on all interfaces
    try:
        with _notified_of_losses():
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                coordinator_bind_address=bind if process_id in (0, None) else None,
            )
    except (RuntimeError, ValueError) as error:
        raise check.UserError(
            f"The processes do not find each other: {check.reason(error)} Start them with a "
            "launcher that JAX detects (SLURM, Open MPI 4, Kubernetes, Cloud TPU), or set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID for each."
        ) from error


def announce(error: BaseException, code: int = 1, shown: str | None = None) -> None:
    """Tells the other processes, if there are any, that this one fails, and ends it at once.

    JAX's own exit would wait for the others, which wait for this one. Where the error is only the
    consequence of another process's end, that one is named instead, and the code is 1.

    Args:
      error: why it fails.
      code: the exit code; after Ctrl-C it is 130.
      shown: the text for stderr; by default a traceback, or one line for a user's mistake.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    chain = list(_chain(error))
    if not _has(KeyboardInterrupt, chain) and _has(jax.errors.JaxRuntimeError, chain):
        _lost.set()  # the watch ends this process if another one's end is the cause
        try:
            time.sleep(_SILENT_SECONDS + 4 * _POLL_SECONDS)
        except KeyboardInterrupt as interrupt:
            chain, shown = [interrupt], None
    with _ending:
        reason = f"process {jax.process_index()} "
        if _has(KeyboardInterrupt, chain):
            reason, code = reason + _INTERRUPTED, INTERRUPTED
            line = f"jdl: {reason}"
        else:
            reason += f"failed: {type(error).__name__}: {error}".splitlines()[0]
            mistake = isinstance(error, check.UserError)
            line = "".join(traceback.format_exception(error))
            line = f"jdl: error: {error}" if mistake else line
        print((shown or line).rstrip(), file=sys.stderr)
        _tell(reason)
        _leave(code)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _has(kind: type[BaseException], chain: list[BaseException]) -> bool:
    return any(isinstance(error, kind) for error in chain)


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
        if not jax.distributed.is_initialized() or jax.process_count() == 1:
            before(kind, error, trace)
        announce(error)

    return excepthook


def _state() -> Any:
    from jax._src import distributed  # the key-value store has no public name

    return distributed.global_state


def _client() -> Any:
    return _state().client


class _Signs:
    """The last state of the store that this process has read."""

    def __init__(self) -> None:
        self.read_at = time.monotonic()
        self._store: dict[str, str] = {}
        self._new_at: dict[str, float] = {}  # when a process's counter last grew

    def read(self) -> bool:
        """Reads the store again; False where process 0, which keeps it, is gone."""
        try:
            store = dict(_client().key_value_dir_get(_KEYS))
        except Exception:
            return False
        self.read_at = time.monotonic()
        for i in range(jax.process_count()):
            name = f"{_ALIVE}{i}"
            if name not in self._new_at or store.get(name) != self._store.get(name):
                self._new_at[name] = self.read_at
        self._store = store
        return True

    def others(self) -> list[str]:
        """The other processes that are alive as far as this one knows."""
        return [
            name
            for name, new_at in self._new_at.items()
            if name != _mine()
            and self._store.get(name) != _LEFT
            and self.read_at - new_at < _SILENT_SECONDS
        ]

    def cause(self) -> str | None:
        """Why this process must end; None if it need not."""
        if _FAILURE in self._store or not _lost.is_set():
            return self._store.get(_FAILURE)
        name, new_at = min(self._new_at.items(), key=lambda item: item[1])
        silent = self.read_at - new_at
        if silent < _SILENT_SECONDS:
            return None
        return f"process {name.removeprefix(_ALIVE)} is gone: no sign of life for {silent:.0f} s"


_signs = _Signs()


def _watch(done: threading.Event) -> None:
    """Ends this process when another one has failed or is gone, whatever it is waiting for."""
    for count in itertools.count():
        if done.wait(_POLL_SECONDS) or _client() is None or _ending.locked():
            return
        with contextlib.suppress(Exception):  # the next line finds the cause
            _client().key_value_set(_mine(), str(count), allow_overwrite=True)
        if _signs.read():
            cause = _signs.cause()
        else:
            if done.wait(_POLL_SECONDS) or _client() is None:
                return  # someone shut the runtime down
            cause = None if _signs.read() else _COORDINATOR_GONE
        if cause is not None:
            _end_because(cause)


def _tell(reason: str) -> None:
    with contextlib.suppress(Exception):  # another was first, or process 0 is gone
        _client().key_value_set(_FAILURE, reason, allow_overwrite=False)


def _mine() -> str:
    return f"{_ALIVE}{jax.process_index()}"


def _end_because(reason: str) -> None:
    with _ending:
        code, line = 1, f"jdl: ended, because {reason}"
        if _INTERRUPTED in reason:
            time.sleep(2 * _POLL_SECONDS)  # Ctrl-C usually reaches all, maybe a moment later
            if _ctrl_c_came():
                code, line = INTERRUPTED, f"jdl: process {jax.process_index()} {_INTERRUPTED}"
        print(line, file=sys.__stderr__)  # sys.stderr may be redirected
        _leave(code)


def _listen_for_ctrl_c() -> None:
    """Records signals at once: Python's handler may wait for a step that waits for the others."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(_caught_signals()[1].fileno(), warn_on_full_buffer=False)


@functools.cache
def _caught_signals() -> tuple[socket.socket, socket.socket]:
    """A pair of sockets; the numbers of caught signals can be read from the first."""
    pair = socket.socketpair()
    for end in pair:
        end.setblocking(False)
    return pair


def _ctrl_c_came() -> bool:
    with contextlib.suppress(BlockingIOError):
        return signal.SIGINT in _caught_signals()[0].recv(1024)
    return False


@contextlib.contextmanager
def _notified_of_losses() -> Iterator[None]:
    """Makes JAX set `_lost` when it loses a process, instead of aborting this one with a dump.

    JAX's client takes a callback for that, but `jax.distributed.initialize` does not expose it, and
    nothing public reaches the client before it connects. jaxlib cannot convert the status for the
    callback and ends in C++'s `std::terminate`, which is caught as well. JAX's option
    `jax_enable_recoverability` avoids both for other processes, but not for the loss of process 0.
    """
    from jax._src.lib import _jax  # type: ignore[attr-defined]

    if sys.platform == "linux":
        _catch_terminate()
    make = _jax.get_distributed_runtime_client
    _jax.get_distributed_runtime_client = functools.partial(
        make, missed_heartbeat_callback=lambda status: _lost.set()
    )
    try:
        yield
    finally:
        _jax.get_distributed_runtime_client = make


@functools.cache
def _catch_terminate() -> Any:
    """Gives the watch time to end this process before C++ aborts it."""
    handler = ctypes.CFUNCTYPE(None)
    set_terminate = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
    set_terminate.argtypes, set_terminate.restype = [handler], handler

    def terminated() -> None:
        if _state().num_processes == 1:
            before()
        _lost.set()
        time.sleep(4 * _POLL_SECONDS)
        if time.monotonic() - _signs.read_at < 3 * _POLL_SECONDS:
            time.sleep(_LEAVE_SECONDS)  # the watch ends this process if another one is the cause
            before()
        if _ending.acquire(timeout=2 * _POLL_SECONDS):  # the watch is blocked by JAX's client
            reason = _signs.cause() or _COORDINATOR_GONE
            print(f"jdl: ended, because {reason}", file=sys.__stderr__, flush=True)
        os._exit(1)

    caught = handler(terminated)
    before = set_terminate(caught)
    return caught  # kept alive by the cache


def _finish(watch: threading.Thread, done: threading.Event) -> None:
    """At exit: leaves together with the others, watched till all are done.

    The watch must end before JAX's own shutdown: it would take the end of process 0 for a failure,
    and a thread in JAX's client while Python ends would abort the process.
    """
    try:
        # JAX's own barrier at shutdown ends all without naming the process that is missing.
        if _client() is not None:
            _client().wait_at_barrier("jdl/done", 1000 * SHUTDOWN_SECONDS)
    except Exception:
        _lost.set()
        early = f"process {jax.process_index()} was done {SHUTDOWN_SECONDS} s before another"
        reason = _signs.cause() or early
        _tell(reason)
        _end_because(reason)
    done.set()
    watch.join(SHUTDOWN_SECONDS)
    jax.distributed.shutdown()


def _leave(code: int) -> None:
    """Ends this process at once; process 0, which keeps the store, after the others."""
    with contextlib.suppress(Exception):  # else process 0 is gone
        _client().key_value_set(_mine(), _LEFT, allow_overwrite=True)
    end = time.monotonic() + _LEAVE_SECONDS
    while jax.process_index() == 0 and time.monotonic() < end and _signs.read():
        if not _signs.others():
            break
        time.sleep(_POLL_SECONDS / 5)
    for child in multiprocessing.active_children():
        child.kill()  # `os._exit` would leave them behind
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
