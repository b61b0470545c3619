"""AdamW, Muon, Shampoo, SOAP, K-FAC on five nets: the way to AdamW's final loss, memory, compile.

    make bench-matrix DATA=folder
    make bench-matrix DATA=folder ARGS="--nets transformer,vit --optimizers adamw,soap --seeds 3"

All but K-FAC have a schedule, warm-up 5 % and cosine decay to 1/50 (schedule-free AdamW the warm-up
alone), and the best rate of a grid by the held-out loss of the first seed. K-FAC has its defaults,
and runs until its last weights and their average (`jdl.train.ema`) both have AdamW's final loss,
or for `--seconds`. That loss is the mean over the seeds.

Every run is a line of JSON in --out as soon as it is done, and is not repeated; a table is printed
at the end. Time is process CPU time ÷ 2; compilation and evaluation are not counted. Images are
read from --data as `mnist/` and `fashion/`, gzipped IDX files; without `fashion/` all are MNIST's.
"""

import argparse
import functools
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matrix_nets import nets

from jdl.core.objective import Objective
from jdl.optim import by_name, kfac_for, kronecker
from jdl.train import ema

OPTIONS = {"adamw": {"b2": 0.99, "weight_decay": 0.01}, "muon": {"weight_decay": 0.01}}


def scheduled(name, rate, steps):
    """An optimizer with warm-up, and cosine decay unless it is schedule-free."""
    warm = max(1, steps // 20)
    if name.startswith("schedule_free"):
        return by_name(name, rate, warmup_steps=warm)
    rate = optax.warmup_cosine_decay_schedule(0.0, rate, warm, max(steps, warm + 1), rate / 50)
    return by_name(name, rate, **OPTIONS.get(name, {}))


def weights(params, opt_state):
    """The weights to evaluate: with an average the last ones too, before it."""
    chosen = ema.weights_of(opt_state, params)
    return [params, chosen] if isinstance(opt_state, ema.AveragingState) else [chosen]


class Run:
    """An optimizer on a net, with its held-out losses on the way."""

    def __init__(self, net, optimizer, size, seed):
        self.net, optimizer = net, optax.with_extra_args_support(optimizer)
        self.size, self.rng = size, np.random.default_rng(seed)
        self.times, self.curve = [], []

        @functools.partial(jax.jit, donate_argnums=0)
        def step(carry, rows):
            params, state, opt_state = carry
            objective = Objective(net.model, net.loss, state, net.batch(rows))
            value, grad, aux = objective.value_and_grad(params)
            updates, opt_state = optimizer.update(
                grad, opt_state, params, value=value, grad=grad, objective=objective
            )
            return (optax.apply_updates(params, updates), aux.model_state, opt_state), value

        params, state = net.start(seed)
        objective = Objective(net.model, net.loss, state, net.batch(np.arange(size)))
        with kronecker.told(objective, params):
            self.carry = (params, state, jax.jit(optimizer.init)(params))
        opt_state = getattr(self.carry[2], "inner", self.carry[2])  # without the average
        self.bytes = sum(x.nbytes for x in jax.tree.leaves(opt_state))
        self.memory = self.bytes / sum(x.nbytes for x in jax.tree.leaves(params))
        start = time.perf_counter()
        self.step = step.lower(self.carry, self.rows()).compile()
        self.compile = time.perf_counter() - start

    def rows(self):
        return jnp.asarray(self.rng.integers(0, self.net.size, self.size, np.int32))

    def advance(self, steps):
        """Makes so many steps, and then evaluates."""
        for _ in range(steps):
            rows, start = self.rows(), time.process_time()
            self.carry, _ = jax.block_until_ready(self.step(self.carry, rows))
            self.times.append((time.process_time() - start) / 2)
        params, state, opt_state = self.carry
        found = [float(self.net.evaluate(w, state)) for w in weights(params, opt_state)]
        at = (len(self.times), round(sum(self.times), 1))
        self.curve.append((*at, *(round(loss, 4) for loss in found)))
        return found

    def figures(self):
        return {
            "steps": len(self.times),
            "seconds": round(sum(self.times), 1),
            "loss": self.curve[-1][2],
            "ms_median": round(1e3 * statistics.median(self.times), 1),
            "ms_p99": round(1e3 * float(np.percentile(self.times[1:] or self.times, 99)), 1),
            "memory": round(self.memory, 2),
            "compile_s": round(self.compile, 1),
            "curve": self.curve,
        }


def of_schedule(net, name, rate, seed):
    """A whole schedule, evaluated 30 times."""
    run = Run(net, scheduled(name, rate, net.steps), net.batches[1], seed)
    for part in np.array_split(np.arange(net.steps), min(30, net.steps)):
        run.advance(len(part))
    return run.figures()


def of_kfac(net, seed, target, args):
    """K-FAC until its last weights and their average have the target, or time is over."""
    params, state = net.start(seed)
    objective = Objective(net.model, net.loss, state, net.batch(np.arange(net.batches[0])))
    optimizer = ema.averaging(kfac_for(objective, params), args.average)
    run = Run(net, optimizer, net.batches[0], seed)
    left = {0, 1}
    while left and sum(run.times) < args.seconds:
        found = run.advance(max(1, net.steps // 60))
        left -= {i for i, loss in enumerate(found) if loss <= target}
    return run.figures()


def matrix(name, net, args):
    """All runs on a net, those of --out as they are there."""
    seen = args.out.read_text().splitlines() if args.out.exists() else []
    known = {tuple(line["run"]): line for line in map(json.loads, seen)}
    source = {"transformer": "text", "autoencoder": "mnist"}.get(name, args.source)

    def run(optimizer, rate, seed, make):
        key = (name, source, args.share, optimizer, rate, seed)
        if key not in known:
            known[key] = {"run": key, **make()}
            with args.out.open("a") as file:
                file.write(json.dumps(known[key]) + "\n")
            brief = {k: v for k, v in known[key].items() if k != "curve"}
            print(json.dumps(brief), flush=True)
        return known[key]

    runs = {}
    for optimizer in args.optimizers.split(","):
        if optimizer == "kfac":
            target = statistics.mean(x["loss"] for x in runs["adamw"])
            runs[optimizer] = [
                run(optimizer, None, seed, functools.partial(of_kfac, net, seed, target, args))
                for seed in range(args.seeds)
            ]
            continue

        def at(rate, seed, optimizer=optimizer):
            schedule = functools.partial(of_schedule, net, optimizer, rate, seed)
            return run(optimizer, rate, seed, schedule)

        best = min(
            net.rates[optimizer], key=lambda rate: np.nan_to_num(at(rate, 0)["loss"], nan=np.inf)
        )
        runs[optimizer] = [at(best, seed) for seed in range(args.seeds)]
    return runs


def brief(x):
    return f"{x:.0f}" if x >= 1000 else f"{x:.4g}"


def spread(values):
    """The median, and the range where they differ."""
    middle, low, high = map(brief, (statistics.median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} … {high})"


def row(runs, name, target, column):
    """A row of Markdown for an optimizer's runs on a net."""
    found = [next((x for x in run["curve"] if x[column] <= target), None) for run in runs]
    if name == "adamw":  # the target is the end of its schedule
        found = [run["curve"][-1] for run in runs]
    ways = [x for x in found if x is not None]
    missing = f", {len(runs) - len(ways)} did not" * (len(ways) < len(runs))
    if ways:
        way = [spread([x[i] for x in ways]) + missing for i in (0, 1)]
    else:
        way = [f"> {brief(min(run[key] for run in runs))}" for key in ("steps", "seconds")]
    middle = {
        key: brief(statistics.median(run[key] for run in runs))
        for key in ("ms_median", "ms_p99", "memory", "compile_s")
    }
    rate = runs[0]["run"][4]
    cells = [
        name + ", averaged" * (column == 3),
        "default" if rate is None else f"{rate:g}",
        spread([run["curve"][-1][column] for run in runs]),
        *way,
        f"{middle['ms_median']} ({middle['ms_p99']})",
        middle["memory"],
        middle["compile_s"],
    ]
    return f"| {' | '.join(cells)} |"


def table(runs):
    """The target, and lines of Markdown for the runs of a net."""
    target = statistics.mean(run["loss"] for run in runs["adamw"])
    titles = "rate | last loss | steps | s | ms a step (99 %) | state ÷ parameters | compile, s"
    lines = [f"| | {titles} |", "|---" + "|---:" * 7 + "|"]
    for name, of in runs.items():
        lines += [row(of, name, target, i) for i in range(2, len(of[0]["curve"][0]))]
    return target, lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nets", default="transformer,vit,resnet,lstm,autoencoder")
    parser.add_argument(
        "--optimizers",
        default="adamw,schedule_free_adamw,muon,shampoo,soap,kfac",
        help="of the registry, adamw first",
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--data", default="data", help="folder of mnist/ and fashion/")
    parser.add_argument("--seconds", type=float, default=120.0, help="of K-FAC on a net, at most")
    parser.add_argument("--average", type=float, default=0.95, help="decay of K-FAC's mean weights")
    parser.add_argument("--share", type=float, default=1.0, help="of the schedule and the data")
    parser.add_argument("--out", type=Path, default=Path("runs/matrix.jsonl"), help="its results")
    args = parser.parse_args()
    if args.optimizers.split(",")[0] != "adamw":
        parser.error("--optimizers must start with adamw, whose final loss the others are to reach")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    made, args.source = nets(args.data, args.share)
    for name in args.nets.split(","):
        if made.get(name) is None:
            print(json.dumps({"net": name, "skipped": f"no images under {args.data}"}))
            continue
        target, lines = table(matrix(name, made[name](), args))
        print(f"\n{name}, to a loss of {target:.4g}; seeds: {args.seeds}; the runs: {args.out}\n")
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
