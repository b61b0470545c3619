"""What the tests with real processes share."""

import json
import time

import jax
import numpy as np
import orbax.checkpoint as ocp


def checkpoints(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())


def wait_for(condition, process=None, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


def final(workdir, step):
    """Everything the last checkpoint holds, and the log without its clock."""
    with ocp.CheckpointManager(
        workdir / "checkpoints",
        item_handlers={
            "state": ocp.StandardCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        },
    ) as manager:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        leaves = manager.item_metadata(step).state.tree
        targets = {
            path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
            for path, x in leaves.items()
        }
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(targets), meta=ocp.args.JsonRestore()
        )
        found = manager.restore(step, args=args)
    state = {path: np.asarray(x) for path, x in found.state.items()}
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    clock = {"seconds", "data_wait", "memory_estimate"}
    rows = [{k: v for k, v in json.loads(x).items() if k not in clock} for x in lines]
    return state, found.meta["position"], rows
