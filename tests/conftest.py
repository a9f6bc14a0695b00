"""Every test starts from the same seeds, and OpenMP threads that do not spin."""

import os

# OpenMP reads this once, when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# With a worker for each core, more threads would wait for each other, in programs of theirs too.
os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

import zoo

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
settings.register_profile("tersor", derandomize=True, deadline=None)
settings.load_profile("tersor")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real weights and data beside the repository."""
    if not (zoo.DATA / "weights").is_dir():
        pytest.skip(f"needs the real weights and data of {os.path.relpath(zoo.DATA)}")
    return zoo.DATA
