"""Several processes that train together, on JAX's own multi-controller runtime.

Whatever starts the processes (SLURM, Open MPI, Kubernetes, Cloud TPU, a shell) tells them of each
other; `initialize` passes that on to `jax.distributed`, and sees to it that none is left waiting
for one that is gone: a process that fails says so to all, and all end, naming the cause.
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

HEARTBEAT_SECONDS = 10  # a process that gives no sign of life for this long is taken for dead
SHUTDOWN_SECONDS = 30  # how long one that is done waits for the others to be
INTERRUPTED = 130  # the exit code of one that Ctrl-C ended
_KEYS = "jdl/"  # of the store that process 0 keeps for all
_FAILURE = "jdl/failure"
_ALIVE = "jdl/alive/"  # and the process's number: counts up as long as it lives
_COORDINATOR_GONE = "process 0, which coordinates, is gone"
_INTERRUPTED = "was interrupted"
_LEFT = "left"
_POLL_SECONDS = 0.5
_SILENT_SECONDS = 5.0  # one that has not counted on for this long may be the one that is gone
_LEAVE_SECONDS = 5.0  # how long process 0 waits for the others to leave before it
_lost = threading.Event()  # JAX has found a process to be gone, but not said which
_ending = threading.Lock()  # for the thread that ends this process, lest two give a reason


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
        with _hearing_of_losses():
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
    """Tells the other processes, if there are any, that this one fails, and ends it.

    To wait for them, as JAX does at exit, would leave them waiting for this one in turn. Where the
    error only follows from another's end, that one's is told instead, and the code is 1.

    Args:
      error: why it fails.
      code: the exit code; of one interrupted it is 130.
      shown: what is to be said on stderr; by default a traceback, or a line where that is enough.
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
            line = f"jdl: error: {error}" if mistake else _traced(error)
        print((shown or line).rstrip(), file=sys.stderr)
        _tell(reason)
        _leave(code)


def _traced(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those it came of."""
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
    from jax._src import distributed  # JAX shows its key-value store nowhere else

    return distributed.global_state


def _client() -> Any:
    return _state().client


def _read() -> dict[str, str] | None:
    """What the processes have told each other; None where process 0, which keeps it, is gone."""
    try:
        return dict(_client().key_value_dir_get(_KEYS))
    except Exception:
        return None


class _Signs:
    """What this process has last read of the others' state."""

    def __init__(self) -> None:
        self.read_at = time.monotonic()
        self._store: dict[str, str] = {}
        self._new_at: dict[str, float] = {}  # when a process was last seen to have counted on

    def read(self) -> bool:
        """Reads once more; False where process 0, which keeps it, is gone."""
        store = _read()
        if store is None:
            return False
        self.read_at = time.monotonic()
        for i in range(jax.process_count()):
            name = f"{_ALIVE}{i}"
            if name not in self._new_at or store.get(name) != self._store.get(name):
                self._new_at[name] = self.read_at
        self._store = store
        return True

    def others(self) -> list[str]:
        """The other processes that are alive, as far as is known."""
        return [
            name
            for name, new_at in self._new_at.items()
            if name != _mine()
            and self._store.get(name) != _LEFT
            and self.read_at - new_at < _SILENT_SECONDS
        ]

    def cause(self) -> str | None:
        """Why to end, as far as the others' state tells."""
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
        with contextlib.suppress(Exception):  # what it means, the next line finds
            _client().key_value_set(_mine(), str(count), allow_overwrite=True)
        if _signs.read():
            cause = _signs.cause()
        else:
            if done.wait(_POLL_SECONDS) or _client() is None:
                return  # in good order
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
            time.sleep(2 * _POLL_SECONDS)  # as a rule Ctrl-C is for all, and may be on its way
            if _ctrl_c_came():
                code, line = INTERRUPTED, f"jdl: process {jax.process_index()} {_INTERRUPTED}"
        print(line, file=sys.__stderr__)  # even where that is silenced
        _leave(code)


def _listen_for_ctrl_c() -> None:
    """Python's own handler may have to wait for a step that waits for the others."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(_caught_signals()[1].fileno(), warn_on_full_buffer=False)


@functools.cache
def _caught_signals() -> tuple[socket.socket, socket.socket]:
    """The numbers of those that came can be read from the first."""
    pair = socket.socketpair()
    for end in pair:
        end.setblocking(False)
    return pair


def _ctrl_c_came() -> bool:
    with contextlib.suppress(BlockingIOError):
        return signal.SIGINT in _caught_signals()[0].recv(1024)
    return False


@contextlib.contextmanager
def _hearing_of_losses() -> Iterator[None]:
    """Has JAX call us, when a process is lost, instead of aborting this one with a dump.

    JAX's client takes a function for that, which `jax.distributed.initialize` does not pass on.
    As jaxlib cannot hand it the status, it ends in C++'s `std::terminate`: that is caught as well.
    """
    # Nothing public reaches the client before it connects.
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
    """Gives the watch the time to end this process before C++ aborts it."""
    handler = ctypes.CFUNCTYPE(None)
    set_terminate = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
    set_terminate.argtypes, set_terminate.restype = [handler], handler

    def terminated() -> None:
        if _state().num_processes == 1:
            before()
        _lost.set()
        time.sleep(4 * _POLL_SECONDS)
        if time.monotonic() - _signs.read_at < 3 * _POLL_SECONDS:
            time.sleep(_LEAVE_SECONDS)  # the watch ends this process, if it is about the others
            before()
        if _ending.acquire(timeout=2 * _POLL_SECONDS):  # the watch is stuck: JAX's client is locked
            reason = _signs.cause() or _COORDINATOR_GONE
            print(f"jdl: ended, because {reason}", file=sys.__stderr__, flush=True)
        os._exit(1)

    caught = handler(terminated)
    before = set_terminate(caught)
    return caught  # kept alive by the cache


def _finish(watch: threading.Thread, done: threading.Event) -> None:
    """Leaves together with the others, watched till then.

    A thread that were still asking for failures when Python ends would abort the process.
    """
    try:
        # JAX's own, at shutdown, ends all without a word of who was missing.
        if _client() is not None:
            _client().wait_at_barrier("jdl/done", 1000 * SHUTDOWN_SECONDS)
    except Exception:
        _lost.set()
        early = f"process {jax.process_index()} was done {SHUTDOWN_SECONDS} s before another"
        reason = _signs.cause() or early
        _tell(reason)
        _end_because(reason)
    try:
        jax.distributed.shutdown()
    finally:
        done.set()
        watch.join(SHUTDOWN_SECONDS)


def _leave(code: int) -> None:
    """Ends this process at once; process 0, who carries the messages, after the others."""
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
