"""Experiments are run at their quick size as users run them: by the command, through files, with a report."""

import functools

import pytest

from jaxattn.claims import report
from jaxattn.claims.__main__ import main


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Quick runs take long."""
    for item in items:
        if "quick_run" in item.fixturenames:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory):
    """name -> (the folder of seed 0, its result as it is kept) of `python -m experiments run NAME --quick`."""

    @functools.cache
    def run(name):
        folder = tmp_path_factory.mktemp("results")
        main(["run", name, "--quick", "--folder", str(folder)])
        folder /= f"{name}-quick"
        assert (folder / "report.md").exists()
        return folder / "seeds" / "0", report.to_result(report.read_seeds(folder)[0])

    return run
