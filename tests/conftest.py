"""No network, and one core: the environment is set before torch and transformers are imported."""

import os

import pytest

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """See tests.support.tiny_models.Checkpoints."""
    from tests.support.tiny_models import Checkpoints

    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))
