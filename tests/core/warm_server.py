"""Imported by the fork server alone (see warm.py): one small run, so that its children find every import and the data made."""

import multiprocessing
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest  # noqa: F401 - every child imports the main module of the tests again
import torch

from tests.core.small import small_run

# the main module of the tests imports this one, too, when pytest collects by folder
if multiprocessing.parent_process() is None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        small_run(Path(folder), budget="2 steps", save_every="never")
