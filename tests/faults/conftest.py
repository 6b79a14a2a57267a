import pytest
from faults.scenarios import Stops


@pytest.fixture(scope="module")
def stops(tmp_path_factory):
    """Scores of runs that were stopped cleanly, by the step."""
    return Stops(tmp_path_factory.mktemp("stops"))
