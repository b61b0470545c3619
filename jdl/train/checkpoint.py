"""Checkpoints by orbax: asynchronous, atomic, the last few kept.

A state is saved as a flat mapping from each leaf's path to its array, so that a checkpoint of
another model or optimizer is refused with the differing paths named.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdl.core import check
from jdl.core.types import PyTree


class Restored(NamedTuple):
    """What a checkpoint held."""

    state: PyTree
    meta: dict[str, Any]  # what is no array: position in the data, seconds trained, class names


def begun(workdir: Path) -> bool:
    """Whether a run has saved a checkpoint there."""
    return any((workdir / "checkpoints").glob("[0-9]*"))


class Checkpoints:
    """The checkpoints of one directory.

    Args:
      directory: where they lie.
      keep: how many, the newest ones.
      keep_every: besides, all whose step is a multiple of this.
    """

    def __init__(self, directory: str | Path, keep: int = 3, keep_every: int | None = None):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_every, cleanup_tmp_directories=True
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(
            Path(directory).absolute(), options=options, item_handlers=handlers
        )

    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: PyTree, meta: dict[str, Any]) -> None:
        """Starts to write; returns before the bytes are on disk.

        The leaves are copied first: the next step is free to reuse their memory. Checkpoints of
        later steps are of a course that was left; they go once this one is whole.
        """
        if step == self.latest_step():
            return
        args = self._ocp.args
        leaves = {path: jnp.copy(x) for path, x in _leaves(_plain_keys(state)).items()}
        steps = self._manager.all_steps()
        later = [s for s in steps if s > step]
        with self._telling(step):
            if step not in steps:
                items = args.Composite(state=args.StandardSave(leaves), meta=args.JsonSave(meta))
                # Without force, orbax silently saves nothing below its latest step.
                self._manager.save(step, args=items, force=bool(later))
            if later:
                self._manager.wait_until_finished()
                for left in sorted({*later} & {*self._manager.all_steps()}):
                    self._manager.delete(left)

    def restore(self, state: PyTree, shardings: PyTree) -> Restored | None:
        """The newest checkpoint in the structure of `state`, or None if there is none.

        Args:
          state: arrays, or `jax.ShapeDtypeStruct`s, of the structure expected.
          shardings: where its arrays are to lie, in the same structure.

        Raises:
          DataError: the checkpoint is of another model or optimizer.
        """
        step = self.latest_step()
        if step is None:
            return None
        args = self._ocp.args
        expected = jax.eval_shape(_plain_keys, state)
        leaves = _leaves(expected)
        saved = self._manager.item_metadata(step).state.tree
        self._check_same(step, leaves, saved)
        places = dict(_paths(shardings))
        targets = {
            path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[path])
            for path, x in leaves.items()
        }
        found = self._manager.restore(
            step, args=args.Composite(state=args.StandardRestore(targets), meta=args.JsonRestore())
        )
        filled = [
            found.state[path]
            if x.size
            else jax.device_put(jnp.zeros(x.shape, x.dtype), places[path])
            for path, x in _paths(expected)
        ]
        restored = jax.tree.unflatten(jax.tree.structure(expected), filled)
        return Restored(_typed_keys(restored, state), dict(found.meta))

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
                f"The checkpoint of step {step} in {self._manager.directory} is of another model "
                f"or optimizer: {shown}. Choose another work directory, or train what it holds."
            )

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        with self._telling(None):
            self._manager.wait_until_finished()

    @contextmanager
    def _telling(self, step: int | None) -> Iterator[None]:
        """Says of a write that failed, a full disk say, what it leaves behind."""
        try:
            yield
        except Exception as error:
            whole = [s for s in self._manager.all_steps(read=True) if s != step]
            kept = f"That of step {max(whole)} is whole." if whole else "There is none yet."
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise check.TrainingError(
                f"A checkpoint could not be written to {self._manager.directory}: {reason}. {kept}"
            ) from error

    def delete(self, step: int) -> None:
        """Removes the checkpoint of this step."""
        self._manager.delete(step)

    def meta(self) -> dict[str, Any] | None:
        """What the newest whole checkpoint holds besides arrays, or None if there is none."""
        step = self.latest_step()
        if step is None:
            return None
        args = self._ocp.args
        return dict(self._manager.restore(step, args=args.Composite(meta=args.JsonRestore())).meta)

    def close(self) -> None:
        """Waits, and releases the directory."""
        self._manager.close()


def _paths(tree: PyTree) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), x) for path, x in jax.tree.leaves_with_path(tree)]


def _leaves(tree: PyTree) -> dict[str, Any]:
    """Path -> leaf; empty leaves hold nothing to save, and orbax refuses them."""
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
