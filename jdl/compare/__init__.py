"""Optimizers compared under one clock, in a report that can be published."""

from jdl.compare import drawing
from jdl.compare.budget import Budget
from jdl.compare.catalogue import CATALOGUE, by_name, digits_cnn
from jdl.compare.optimizers import Entry, named
from jdl.compare.problems import Problem, Split, arrays_problem, tar_problem
from jdl.compare.report import write as write_report
from jdl.compare.results import Results, Target, table
from jdl.compare.store import load_results
from jdl.compare.study import Event, Study
from jdl.compare.tuning import Tuning

__all__ = [
    "CATALOGUE",
    "Budget",
    "Entry",
    "Event",
    "Problem",
    "Results",
    "Split",
    "Study",
    "Target",
    "Tuning",
    "arrays_problem",
    "by_name",
    "digits_cnn",
    "drawing",
    "load_results",
    "named",
    "table",
    "tar_problem",
    "write_report",
]
