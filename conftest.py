"""For every run of pytest, of tests and (nbval) of notebooks: where results go, and which tests share a process."""
import os
import shutil
import tempfile

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Results go to a temporary folder, handed to workers and kernels through the environment, gone at the end."""
    if hasattr(config, "workerinput"):                     # a worker of pytest-xdist has it from its parent
        return
    folder = tempfile.mkdtemp(prefix="saferule-tests-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ.update(SAFERULE_RESULTS=folder, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For --dist loadgroup: a file's tests stay together, and all notebooks run one after the other: each needs its forerunners."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group("notebooks" if item.path.suffix == ".ipynb" else item.path.name))
