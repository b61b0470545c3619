"""Warm: compiles the programs of `loop` and `clock` into the cache, several at a time."""

import concurrent.futures
import functools

import clock_part
import loop_part
from results import timed


def run(results, *, tiny, data):
    jobs = {
        f"loop, {name}": functools.partial(both_loops, case)
        for name, case in sorted(loop_part.cases(tiny).items(), key=lambda x: -x[1].shape[0])
    }
    for name, contest in clock_part.contests(tiny, data).items():
        for which, chosen in contest.optimizers.items():
            if chosen[0] is not None:
                jobs[f"{name}: {which}"] = functools.partial(clock_part.prepared, contest, *chosen)
    with concurrent.futures.ThreadPoolExecutor(1 if tiny else 5) as pool:
        list(pool.map(lambda name: one(results, name, jobs[name]), jobs))


def both_loops(case):
    loops, _ = loop_part.compiled(case)
    loops["bare"].queued_ms(0)


def one(results, name, job):
    """A row with the seconds until its first steps are made, beside all the others."""
    if results.left() > 0:
        with results.guard(name):
            results.add(name, seconds=timed(lambda: job() and None)[1])
