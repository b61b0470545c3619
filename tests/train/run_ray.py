"""Two CPU workers of Ray's JaxTrainer that train together: `run_ray.py FOLDER HOW`.

HOW is "inside" (each worker initializes), "config" (Ray does), or "copies" (nobody does, and each
worker by itself would train a copy).
"""

import os
import sys

folder, how = sys.argv[1:]


def train_loop():
    import socket

    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    from jdl.train import distributed

    context = ray.train.get_context()
    assert context.get_world_size() == 2
    if how == "inside":
        with socket.socket() as s:
            s.bind(("", 0))
            free = f"{ray.util.get_node_ip_address()}:{s.getsockname()[1]}"
        coordinator = broadcast_from_rank_zero(free)
        distributed.initialize(coordinator, 2, context.get_world_rank())
    else:
        distributed.initialize(expected=context.get_world_size())

    import jax
    import numpy as np

    import jdl
    from jdl.data import from_arrays
    from jdl.models import MLP
    from jdl.optim import registry

    print(f"process {jax.process_index()} of {jax.process_count()}", flush=True)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(101, 6)).astype(np.float32)
    labels = np.argmax(x[:, :3], axis=1).astype(np.int32)
    estimator = jdl.classifier(
        MLP(widths=(16,), num_outputs=3),
        registry.by_name("adam"),
        workdir=f"{folder}/run",
        log_every=1,
    )
    estimator.train(from_arrays(x, labels, batch_size=24, seed=0), max_steps=4)


if __name__ == "__main__":
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2.jax import JaxTrainer
    from ray.train.v2.jax.config import JaxConfig

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path[1:]))}},
    )
    JaxTrainer(
        train_loop,
        jax_config=JaxConfig(use_tpu=how == "config"),  # with JAX_PLATFORMS=cpu it takes CPUs
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(storage_path=f"{folder}/ray"),
    ).fit()
