"""What the tests of the CUDA kernels share: a folder of units compiled for the CPU, compiled once."""

import shutil

import pytest

from tests.kernels.cuda.host import HostLauncher


@pytest.fixture(scope="session")
def units(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++ to run the kernels on the CPU with")
    return tmp_path_factory.mktemp("units")


@pytest.fixture
def launcher(units):
    return HostLauncher(units)
