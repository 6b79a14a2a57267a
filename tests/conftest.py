import os
import signal

import pytest
import torch
from checks import Checks

# Trainings of a few dozen parameters run ten times longer on threads that contend for cores. The variable holds in
# other processes, too, and keeps Lightning's strategies for several processes from choosing another number in this one.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# A test sees no power cut, and waiting for the disk took a quarter of the time.
os.fsync = lambda descriptor: None


def pytest_addoption(parser):
    parser.addoption("--checks", metavar="PATH", help="write the tables of checks to this page")


def pytest_configure(config):
    config.pluginmanager.register(Checks(config), "checks")


@pytest.fixture(autouse=True)
def _seeded():
    """Everything random starts at 0."""
    torch.manual_seed(0)


@pytest.fixture
def _ctrl_c():
    """Lightning ignores SIGINT from a KeyboardInterrupt on."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)
