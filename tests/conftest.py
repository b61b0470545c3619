"""What every test runs under: 2 simulated devices, strict types and ranks, checked shapes."""

import os
from importlib.metadata import version

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MPLBACKEND"] = "agg"

from jaxtyping import install_import_hook

install_import_hook("jdl", "beartype.beartype")

import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_report_header():
    names = ("jax", "numpy", "flax", "optax", "grain", "orbax-checkpoint")
    return "stack: " + ", ".join(f"{name} {version(name)}" for name in names)
