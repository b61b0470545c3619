"""Loop: the Estimator against a bare, hand-written jit loop of the same net on the same batches.

Both get the same batches, which lie on the device already; `from_arrays` is the Estimator on arrays
of the host, gathered and sent as it goes. `queued` is a scan over steps inside one program, in
which the device never waits for the host; idle shares are 1 − queued / measured, or, where no scan
was compiled, against the bare loop. A last row has the share that JAX's profiler sees.
"""

import concurrent.futures
import functools
import glob
import itertools
import statistics
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from nets import ResNet, size
from results import timed

import jdl
from jdl.data import from_arrays
from jdl.models import CNN, MLP


class Case(NamedTuple):
    """A net and what it is given.

    Attributes:
      module: a Linen module.
      shape: of an image.
      batch_size: images a step.
      compute_dtype: of the model; None for float32.
      queued: how many steps the scan makes; 0 for none.
    """

    module: Any
    shape: tuple[int, int, int]
    batch_size: int
    compute_dtype: str | None = None
    queued: int = 0


def cases(tiny):
    """name -> case, the most important first."""
    if tiny:
        return {
            "net 4-4-10, batch 32": Case(MLP(widths=(4,)), (2, 2, 1), 32, queued=50),
            "CNN, 16², float32": Case(CNN(units=16), (16, 16, 1), 16, queued=5),
            "ResNet, 32²": resnet(tiny),
            "CNN, 16², bfloat16": Case(CNN(units=16), (16, 16, 1), 16, "bfloat16"),
        }
    return {
        "net 4-4-10, batch 32": Case(MLP(widths=(4,)), (2, 2, 1), 32, queued=1000),
        "default CNN, 128², float32, batch 64": Case(CNN(), (128, 128, 1), 64, queued=50),
        "ResNet-50, 224², bfloat16, batch 256": resnet(tiny),
        "default CNN, 128², bfloat16, batch 64": Case(CNN(), (128, 128, 1), 64, "bfloat16", 50),
    }


def resnet(tiny):
    """ResNet-50, or one of a few thousand parameters."""
    small = ResNet(blocks=(1, 1), width=8, num_classes=10)
    sizes = (small, (32, 32, 3), 8) if tiny else (ResNet(), (224, 224, 3), 256)
    return Case(*sizes, "bfloat16")


def optimizer():
    return optax.sgd(0.01, momentum=0.9)


def random_arrays(case, count):
    """Images of bytes and classes."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *case.shape), dtype=np.uint8)
    return images, rng.integers(0, 10, count).astype(np.int32)


def estimator_of(case):
    """The Estimator of a case, on one device."""
    options = {"compute_dtype": case.compute_dtype, "devices": jax.devices()[:1]}
    return jdl.classifier(case.module, optimizer(), **options)


# ---------------------------------------------------------------------- the bare loop


class Bare:
    """The loop one writes by hand: step, loss and accuracy, nothing else."""

    def __init__(self, model, batches, queued):
        self._batches, self._queued = itertools.cycle(batches), queued
        self._optimizer, self._model = optimizer(), model
        init = jax.jit(model.init)
        params, state = init(jax.random.key(0), scaled(batches[0]["image"][:1]))
        self.parameters = size(params)
        self._carry = (params, state, self._optimizer.init(params), jnp.zeros((), jnp.int32))
        step = jax.jit(self._step, donate_argnums=0)
        self._run, self.compile_seconds = timed(
            lambda: step.lower(self._carry, batches[0]).compile()
        )
        self._scan = jax.jit(self._steps, donate_argnums=0) if queued else None

    def _step(self, carry, batch):
        params, state, opt_state, i = carry

        def loss(params):
            key = jax.random.fold_in(jax.random.key(1), i)
            logits, new = self._model.apply(
                params, state, scaled(batch["image"]), key=key, train=True
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits.astype(jnp.float32), batch["label"]
            )
            return jnp.mean(losses), (new, jnp.mean(jnp.argmax(logits, -1) == batch["label"]))

        (value, (new, accuracy)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = self._optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, new, opt_state, i + 1), {"loss": value, "accuracy": accuracy}

    def _steps(self, carry, batch):
        body = lambda carry, _: self._step(carry, batch)  # noqa: E731
        return jax.lax.scan(body, carry, None, length=self._queued)

    def __call__(self, steps):
        """So many steps, and waits for the last."""
        for _ in range(steps):
            self._carry, logs = self._run(self._carry, next(self._batches))
        jax.block_until_ready(logs)

    def queued_ms(self, rounds):
        """Milliseconds of a step within the scan; None where there is none."""
        if self._scan is None:
            return None
        found = []
        for _ in range(rounds + 1):
            (self._carry, _), seconds = timed(
                lambda: jax.block_until_ready(self._scan(self._carry, next(self._batches)))
            )
            found.append(1e3 * seconds / self._queued)
        return statistics.median(found[1:] or found)


def scaled(image):
    return jnp.asarray(image, jnp.float32) / 255.0


# ---------------------------------------------------------------------- measurements


def run(results, *, tiny, data):
    del data
    contests = []
    for name, case in cases(tiny).items():
        with results.guard(name):
            loops, figures = compiled(case)
            contests.append((name, loops))
            measure(results, name, case, loops, figures, tiny)
    for name, loops in contests:
        if results.left() > 5:
            with results.guard(f"profile, {name}"):
                profiled(results, name, loops)


def compiled(case):
    """name -> `run(steps)`, and what is known before they run; both programs compiled at once."""
    images, labels = random_arrays(case, 4 * case.batch_size)
    rows = [slice(i, i + case.batch_size) for i in range(0, len(images), case.batch_size)]
    device = jax.devices()[0]
    batches = [jax.device_put({"image": images[r], "label": labels[r]}, device) for r in rows]
    estimator = estimator_of(case)
    there = itertools.cycle(batches)
    arrays = from_arrays(images, labels, batch_size=case.batch_size, shuffle=True, seed=0)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        bare = pool.submit(Bare, estimator.model, batches, case.queued)
        estimator.train(there, steps=2)
        bare = bare.result()
    bare(2)
    estimator.train(arrays, steps=2)
    loops = {
        "jdl": lambda steps: estimator.train(there, steps=steps),
        "bare": bare,
        "from_arrays": lambda steps: estimator.train(arrays, steps=steps),
    }
    figures = {
        "parameters": bare.parameters,
        "compile_seconds": {"jdl": estimator.compile_seconds, "bare": bare.compile_seconds},
        "compiler_bytes": dict(estimator.memory),
    }
    return loops, figures


def measure(results, name, case, loops, figures, tiny):
    """Milliseconds a step of all loops, in turns."""
    turn, rounds = (0.2, 2) if tiny else (0.7, 3)
    steps, times = {}, {loop: [] for loop in loops}
    for loop, run_steps in loops.items():
        run_steps(10)
        _, probe = timed(functools.partial(run_steps, 10))
        steps[loop] = max(3, int(10 * turn / probe))
    for _ in range(rounds):
        for loop, run_steps in loops.items():
            _, seconds = timed(functools.partial(run_steps, steps[loop]))
            times[loop].append(1e3 * seconds / steps[loop])
    ms = {loop: statistics.median(x) for loop, x in times.items()}
    queued = loops["bare"].queued_ms(rounds)
    floor = ms["bare"] if queued is None else queued
    stats = jax.devices()[0].memory_stats() or {}
    results.add(
        name,
        ms=ms,
        queued_ms=queued,
        ratio=ms["bare"] / ms["jdl"],
        ratio_from_arrays=ms["bare"] / ms["from_arrays"],
        images_per_second={loop: 1e3 * case.batch_size / x for loop, x in ms.items()},
        idle={loop: max(0.0, 1 - floor / x) for loop, x in ms.items()},
        idle_against="bare loop" if queued is None else "scan",
        device_peak_bytes=stats.get("peak_bytes_in_use"),
        steps=steps,
        spread_ms=times,
        **figures,
    )


def profiled(results, name, loops):
    """The share of time without any kernel, by the profiler."""
    found = {}
    for loop in ("jdl", "bare"):
        with tempfile.TemporaryDirectory() as folder:
            steps = 10
            with jax.profiler.trace(folder):
                loops[loop](steps)
            files = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
            found[loop] = idle_in(files[0]) if files else None
    results.add(f"profile, {name}", idle=found, steps=steps)


def idle_in(path):
    """1 − the union of all kernels' times over the time from the first to the last."""
    spans = []
    for plane in jax.profiler.ProfileData.from_file(path).planes:
        if "/device:GPU" in plane.name or "/device:TPU" in plane.name:
            for line in plane.lines:
                if "Stream" in line.name or "XLA Ops" in line.name:
                    spans += [(e.start_ns, e.start_ns + e.duration_ns) for e in line.events]
    if not spans:
        return None
    spans.sort()
    busy, until = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return 1 - busy / max(until - spans[0][0], 1e-9)
