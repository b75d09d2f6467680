"""Reasoning tasks in Chinese and English: problems made by program, with their answers and their steps.

problems.py draws the content of a problem and works it out; wordings.py puts it into words; dataset.py makes the files of a data set,
with wordings, problems and lengths that training never sees; measure.py and plots.py are what tools.reasoning_report consists of.
"""

from __future__ import annotations

from tools.reasoning_tasks.dataset import SPLITS, STYLES, make_dataset
from tools.reasoning_tasks.problems import KINDS, Problem

__all__ = ["KINDS", "SPLITS", "STYLES", "Problem", "make_dataset"]
