"""jaxopt beside us: the same script is run with either library in the place of `lib`."""

import warnings

import jax
import pytest

from jdl import solvers


@pytest.fixture(scope="session")
def jaxopt():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is no longer maintained
        return pytest.importorskip("jaxopt")


@pytest.fixture
def both(jaxopt):
    """Runs `script(lib, jax)` with jdl.solvers, then with jaxopt, which needs JAX to be lenient."""

    def run(script):
        ours = script(solvers)
        with (
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            return ours, script(jaxopt)

    return run
