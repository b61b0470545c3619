"""Optimizers compared under one clock, in a report that can be published."""

from jdl.compare.budget import Budget
from jdl.compare.optimizers import Entry, named
from jdl.compare.problems import Problem, digits_cnn, tar_problem
from jdl.compare.report import write as write_report
from jdl.compare.results import Results, Target, load, table
from jdl.compare.study import Event, Study

__all__ = [
    "Budget",
    "Entry",
    "Event",
    "Problem",
    "Results",
    "Study",
    "Target",
    "digits_cnn",
    "load",
    "named",
    "table",
    "tar_problem",
    "write_report",
]
