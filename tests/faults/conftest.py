import pytest
import torch
from faults.scenarios import Stops


@pytest.fixture(scope="module", autouse=True)
def forks():
    """Processes that are to be killed are forked."""
    if torch.cuda.is_available():
        pytest.skip("CUDA forbids forked processes")


@pytest.fixture(scope="module")
def stops(tmp_path_factory):
    """Scores of runs that were stopped cleanly, by the step."""
    return Stops(tmp_path_factory.mktemp("stops"))
