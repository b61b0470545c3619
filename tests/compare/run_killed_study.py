"""A study of one slow trial, for a test that kills it; prints where it resumed."""

import sys
import time

import jax
import optax

from jdl.compare import Budget, Entry, Study, by_name, trial
from jdl.train.estimator import Estimator


def slow():
    def nap(x):
        time.sleep(0.01)
        return x

    inner = optax.sgd(1e-4)

    def update(grads, state, params=None, **_):
        first = jax.tree.leaves(grads)[0]
        waited = jax.pure_callback(nap, jax.ShapeDtypeStruct((), first.dtype), first.ravel()[0])
        return inner.update(jax.tree.map(lambda g: g + 0.0 * waited, grads), state, params)

    return optax.GradientTransformation(inner.init, update)


def main(workdir):
    trial.SAVE_SECONDS, trial.STRETCH_SECONDS = 0.5, 0.2
    initialize = Estimator.initialize

    def told(self, data):
        found = initialize(self, data)
        print(f"went on from {self.step}", flush=True)
        return found

    Estimator.initialize = told
    Study(
        by_name("rosenbrock"),
        [Entry("sgd", slow)],
        budget=Budget(600, "steps"),
        evaluations=12,
        workdir=workdir,
    ).run()


if __name__ == "__main__":
    main(sys.argv[1])
