"""No network, and one core: the environment is set before torch and transformers are imported.

With -n, a file's tests stay with one worker, since they share what the file's fixtures make; all tests over several
processes stay with one, too, so that no two runs with deadlines take each other's cores. The long ones come first.
"""

import os

import pytest

try:
    from xdist.scheduler import LoadScopeScheduling
except ImportError:  # tests run one after another, too
    LoadScopeScheduling = object

MAX_WORKERS = 8
LONG_FIRST = ("tests/multiprocess/", "tests/lossless/", "tests/unit/launch/")

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "OMP_NUM_THREADS": "1",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next(
            (index for index, folder in enumerate(LONG_FIRST) if item.nodeid.startswith(folder)), len(LONG_FIRST)
        )

    items.sort(key=place)


class FileByFile(LoadScopeScheduling):
    """Hands out whole files, and all of tests/multiprocess as one."""

    def _split_scope(self, nodeid: str) -> str:
        return LONG_FIRST[0] if nodeid.startswith(LONG_FIRST[0]) else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """With -n logical a worker for each core, and one more: that with tests/multiprocess waits for deadlines mostly."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_WORKERS, cores + 1)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # the order is `pytest_collection_modifyitems`'s


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log) -> FileByFile:
    return FileByFile(config, log)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """See tests.support.tiny_models.Checkpoints."""
    from tests.support.tiny_models import Checkpoints

    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))
