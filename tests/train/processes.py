"""Runs a test file as the program of several processes: `python FILE rank folder`."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parents[1]


def results_of(program: str, folder: Path, workers: int) -> list[Any]:
    """What each rank has stored as `<rank>.pt` in the folder."""
    search = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    running = [
        subprocess.Popen(
            [sys.executable, "-X", "faulthandler", program, str(rank), str(folder)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": search},
        )
        for rank in range(workers)
    ]
    errors = [process.communicate(timeout=300)[1] for process in running]
    codes = [process.returncode for process in running]
    assert codes == [0] * workers, "\n".join([f"they ended with {codes}", *errors])
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(workers)]
