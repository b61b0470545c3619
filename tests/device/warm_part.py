"""Warm: compiles the programs of `loop` and `clock` into the cache, several at a time."""

import functools

import clock_part
import loop_part
from results import timed


def run(results, *, tiny, data):
    """What takes longest first: the ResNet of `loop`, then K-FAC's steps."""
    jobs = {
        f"loop, {name}": functools.partial(both_loops, case)
        for name, case in loop_part.cases(tiny).items()
    }
    jobs |= {k: job for k, job in clock_part.preparations(tiny, data).items() if job}
    order = sorted(jobs, key=lambda name: ("ResNet" not in name, "kfac" not in name))
    rows = {name: functools.partial(one, results, name, jobs[name]) for name in order}
    results.together(rows, threads=2 if tiny else 8)


def both_loops(case):
    loops, _ = loop_part.compiled(case)
    loops["bare"].queued_ms(0)


def one(results, name, job):
    """A row with the seconds until its first steps are made, beside all the others."""
    results.add(name, seconds=timed(lambda: job() and None)[1])
