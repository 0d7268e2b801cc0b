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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """pytest-xdist: a file's tests share a process, and so do all notebooks, one after the other: each needs its forerunners."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "notebooks" if file.startswith("notebooks/") else file

    return Files(config, log)
