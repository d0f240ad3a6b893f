import importlib
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small networks: a second thread only waits, on a busy machine for ages

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPTS = ("sac_pave_continuous", "td3_pave_continuous")
SMALL = {  # settings of a short, cheap run
    "env_id": "Pendulum-v1", "total_timesteps": 300, "learning_starts": 100, "batch_size": 32, "buffer_size": 1000,
    "eval_interval": 200, "eval_episodes": 1, "compile": False,
}  # fmt: skip


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each of the two scripts, as a module."""
    return importlib.import_module(request.param)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def small_args(script, tmp_path):
    """Make settings for a small run of `script` that writes below tmp_path."""
    return lambda **changes: script.Args(**SMALL | {"output_dir": str(tmp_path / "runs")} | changes)
