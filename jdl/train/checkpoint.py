"""Checkpoints by orbax: asynchronous, atomic, the last few kept.

A state is saved as a flat mapping from each leaf's path to its array, so that a checkpoint of
another model or optimizer is refused with the differing paths named.
"""

import json
import logging
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jdl.core import check
from jdl.core.types import PyTree

logger = logging.getLogger("jdl.train")

_T = TypeVar("_T")


class Restored(NamedTuple):
    """The contents of a checkpoint."""

    state: PyTree
    meta: dict[str, Any]  # all but arrays: position in the data, seconds trained, class names


def begun(workdir: Path) -> bool:
    """Whether a run has saved a checkpoint there."""
    return bool(_steps(workdir / "checkpoints"))


class Checkpoints:
    """The checkpoints in one directory.

    Reading changes nothing in the directory and needs no permission to write there, so that any
    number of processes may read while one trains. The first save opens it for writing.

    Args:
      directory: where they are.
      keep: how many, the newest ones.
      keep_every: besides, all whose step is a multiple of this.
    """

    def __init__(self, directory: str | Path, keep: int = 3, keep_every: int | None = None):
        self.directory = Path(directory).absolute()
        self._keep, self._keep_every = keep, keep_every
        self._manager: Any = None  # while it is open for writing
        self._damaged: set[int] = set()

    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint, or None."""
        return max(_steps(self.directory) - self._damaged, default=None)

    # ------------------------------------------------------------------ writing

    def save(self, step: int, state: PyTree, meta: dict[str, Any]) -> None:
        """Starts to write; returns before the bytes are on disk. One process at a time may save.

        The leaves are copied first: the next step is free to reuse their memory. Checkpoints of
        later steps, from before a rollback, are deleted once this one is complete.
        """
        with self._explaining_failure(step):
            manager = self._opened()
            if step == manager.latest_step():
                return
            args = _orbax().args
            leaves = {path: jnp.copy(x) for path, x in _leaves(_plain_keys(state)).items()}
            steps = manager.all_steps()
            later = [s for s in steps if s > step]
            if step not in steps:
                items = args.Composite(state=args.StandardSave(leaves), meta=args.JsonSave(meta))
                # Without force, orbax silently saves nothing below its latest step.
                manager.save(step, args=items, force=bool(later))
            if later:
                manager.wait_until_finished()
                for later_step in sorted({*later} & {*manager.all_steps()}):
                    manager.delete(later_step)

    def replace(self, step: int, state: PyTree, meta: dict[str, Any]) -> None:
        """Saves; an old checkpoint of this step is deleted once the new one is complete."""
        old, aside = self.directory / str(step), self.directory / f"replaced-{step}"
        leads = jax.process_index() == 0
        if leads and old.exists():
            shutil.rmtree(aside, ignore_errors=True)
            old.rename(aside)
        try:
            self.save(step, state, meta)
            self.close()
        except BaseException:
            if leads and aside.exists() and not old.exists():
                aside.rename(old)
            raise
        if leads:
            shutil.rmtree(aside, ignore_errors=True)

    def _opened(self) -> Any:
        if self._manager is None:
            self._set_aside_damaged()
            options = _orbax().CheckpointManagerOptions(
                max_to_keep=self._keep,
                keep_period=self._keep_every,
                cleanup_tmp_directories=True,  # left by a killed process
            )
            self._manager = _orbax().CheckpointManager(
                self.directory, options=options, item_handlers=_handlers()
            )
        return self._manager

    def _set_aside_damaged(self) -> None:
        """Renames damaged checkpoints, so that training can save under the same steps."""
        if jax.process_index() == 0:
            for step in sorted(self._damaged & _steps(self.directory)):
                aside = self.directory / f"damaged-{step}"
                shutil.rmtree(aside, ignore_errors=True)
                (self.directory / str(step)).rename(aside)
                logger.warning("the damaged checkpoint of step %d is now %s", step, aside)
        self._damaged.clear()

    def close(self) -> None:
        """Returns when everything saved is on disk; the next save opens the directory again."""
        if self._manager is None:
            return
        try:
            with self._explaining_failure(None):
                self._manager.close()
        finally:
            self._manager = None

    @contextmanager
    def _explaining_failure(self, step: int | None) -> Iterator[None]:
        """Turns a failed write, on a full disk say, into an error naming the last checkpoint."""
        try:
            yield
        except Exception as error:
            whole = _steps(self.directory) - {step}
            kept = f"That of step {max(whole)} is whole." if whole else "There is none yet."
            raise check.TrainingError(
                f"A checkpoint could not be written to {self.directory}: {check.reason(error)}. "
                f"{kept}"
            ) from error

    # ------------------------------------------------------------------ reading

    def steps(self) -> list[int]:
        """The steps of the whole checkpoints."""
        return sorted(_steps(self.directory) - self._damaged)

    def restore(self, state: PyTree, shardings: PyTree, step: int | None = None) -> Restored | None:
        """The newest whole checkpoint in the structure of `state`, or None if there is none.

        Args:
          state: arrays, or `jax.ShapeDtypeStruct`s, of the structure expected.
          shardings: of its arrays, in the same structure.
          step: of `steps`, for that checkpoint instead.

        Raises:
          DataError: the checkpoint is of another model or optimizer, or none can be read.
        """
        read = partial(self._read, state=state, shardings=shardings)
        return self._newest(read) if step is None else read(step)

    def arrays(self) -> dict[str, np.ndarray] | None:
        """Path -> array of the newest whole checkpoint, on the host; None if there is none."""
        return self._newest(self._read_arrays)

    def meta(self) -> dict[str, Any] | None:
        """All but the arrays of the newest whole checkpoint, or None if there is none."""
        return self._newest(self._read_meta)

    def _newest(self, read: Callable[[int], _T]) -> _T | None:
        """The result of `read` for the newest checkpoint that it can read; warns of newer ones."""
        failed: dict[int, Exception] = {}
        while untried := _steps(self.directory) - failed.keys():
            step = max(untried)
            try:
                found = read(step)
            except Exception as error:
                if isinstance(error, check.UserError):
                    raise  # the checkpoint is of another model
                if step not in _steps(self.directory):
                    continue  # a training process has deleted it
                if not _is_damage(error):
                    raise
                failed[step] = error
                continue
            newer = {bad: why for bad, why in failed.items() if bad > step}
            for bad, why in newer.items():
                logger.warning(
                    "the checkpoint of step %d cannot be read (%s); that of step %d is taken "
                    "instead. To remove it: rm -r %s",
                    *(bad, check.reason(why), step, shlex.quote(str(self.directory / str(bad)))),
                )
            self._damaged |= newer.keys()
            return found
        if not failed:
            return None
        self._damaged |= failed.keys()
        reasons = "; ".join(f"step {step}: {check.reason(why)}" for step, why in failed.items())
        raise check.DataError(
            f"No checkpoint in {self.directory} can be read ({reasons}). To begin anew, remove "
            f"them: rm -r {shlex.quote(str(self.directory))}"
        )

    def _read(self, step: int, state: PyTree, shardings: PyTree) -> Restored:
        args = _orbax().args
        expected = jax.eval_shape(_plain_keys, state)
        leaves = _leaves(expected)
        with _orbax().Checkpointer(_orbax().CompositeCheckpointHandler(**_handlers())) as reader:
            saved = reader.metadata(self.directory / str(step)).item_metadata.state
            if saved is None:
                raise ValueError("state/_METADATA is missing")
            self._check_same(step, leaves, saved.tree)
            places = dict(_paths(shardings))
            targets = {
                path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[path])
                for path, x in leaves.items()
            }
            found = reader.restore(
                self.directory / str(step),
                args.Composite(state=args.StandardRestore(targets), meta=args.JsonRestore()),
            )
        filled = [
            found.state[path]
            if x.size
            else jax.device_put(jnp.zeros(x.shape, x.dtype), places[path])
            for path, x in _paths(expected)
        ]
        restored = jax.tree.unflatten(jax.tree.structure(expected), filled)
        return Restored(_typed_keys(restored, state), dict(found.meta))

    def _read_arrays(self, step: int) -> dict[str, np.ndarray]:
        with _orbax().Checkpointer(_orbax().CompositeCheckpointHandler(**_handlers())) as reader:
            saved = reader.metadata(self.directory / str(step)).item_metadata.state
            place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            targets = {
                path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
                for path, x in saved.tree.items()
            }
            state = _orbax().args.StandardRestore(targets)
            found = reader.restore(self.directory / str(step), _orbax().args.Composite(state=state))
        return {path: np.asarray(x) for path, x in found.state.items()}

    def _read_meta(self, step: int) -> dict[str, Any]:
        return dict(json.loads((self.directory / str(step) / "meta" / "metadata").read_bytes()))

    def _check_same(self, step: int, expected: dict[str, Any], saved: dict[str, Any]) -> None:
        def shape(x: Any) -> str:
            return f"{jnp.dtype(x.dtype).name}{list(x.shape)}"

        differing = [f"{path} is new" for path in sorted(expected.keys() - saved.keys())]
        differing += [f"{path} is gone" for path in sorted(saved.keys() - expected.keys())]
        differing += [
            f"{path} was {shape(saved[path])}, is {shape(expected[path])}"
            for path in sorted(saved.keys() & expected.keys())
            if shape(saved[path]) != shape(expected[path])
        ]
        if differing:
            shown = "; ".join(differing[:6]) + ("; …" if len(differing) > 6 else "")
            raise check.DataError(
                f"The checkpoint of step {step} in {self.directory} is of another model "
                f"or optimizer: {shown}. Choose another work directory, or train what it holds."
            )


def _orbax() -> Any:
    import orbax.checkpoint  # slow to import, and not needed without a run directory

    return orbax.checkpoint


def _handlers() -> dict[str, Any]:
    orbax = _orbax()
    return {"state": orbax.StandardCheckpointHandler(), "meta": orbax.JsonCheckpointHandler()}


def _steps(directory: Path) -> set[int]:
    """The steps of the complete checkpoints: orbax gives them a number as name at the end."""
    return {int(path.name) for path in directory.glob("[0-9]*") if path.name.isdigit()}


def _is_damage(error: Exception) -> bool:
    """Whether the files are damaged: not a lack of memory or rights, or an unreachable disk."""
    others = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED")
    if isinstance(error, MemoryError) or any(word in str(error) for word in others):
        return False
    return not isinstance(error, OSError) or isinstance(error, FileNotFoundError)


def _paths(tree: PyTree) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), x) for path, x in jax.tree.leaves_with_path(tree)]


def _leaves(tree: PyTree) -> dict[str, Any]:
    """Path -> leaf, without empty arrays, which orbax refuses."""
    return {path: x for path, x in _paths(tree) if x.size}


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _plain_keys(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def _typed_keys(tree: PyTree, like: PyTree) -> PyTree:
    def typed(x: Any, like: Any) -> Any:
        if not _is_key(like):
            return x
        return jax.random.wrap_key_data(x, impl=jax.random.key_impl(jnp.empty((), like.dtype)))

    return jax.tree.map(typed, tree, like)
