import shutil
import sys
import warnings

import pytest
from cli_samples import write_home

with warnings.catch_warnings():
    # Some pairs of releases of typer and click that may be installed together: typer, as it is
    # imported, names functions of click that have been renamed since.
    warnings.filterwarnings("ignore", message="'click", category=DeprecationWarning)
    import typer  # noqa: F401


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    pytest.importorskip("transformers")
    pytest.importorskip("flwr_datasets")
    return write_home(tmp_path_factory.mktemp("home"))


@pytest.fixture
def home(pristine, tmp_path):
    """A folder with a configuration, data and a model, for one test alone."""
    folder = tmp_path / "home"
    shutil.copytree(pristine, folder)
    return folder


@pytest.fixture
def call(capfd, monkeypatch):
    """Run a command in this process; returns its exit code, output and errors."""
    from fedveil import cli

    # The name "fedveil.cli.app" is also that of the commands, which its module makes.
    monkeypatch.setattr(sys.modules["fedveil.cli.app"], "_debug", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments):
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return caught.value.code or 0, out, err

    return run
