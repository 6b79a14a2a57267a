"""The committed page of checks has the rows that the tests declare, and the plugin fills them as it says."""

from pathlib import Path

import conftest
import pytest
from checks import Cell, page, read

PAGE = Path(__file__).parent.parent / "docs" / "checks.md"


def test_the_page_shows_what_the_tests_declare(request):
    """After adding or renaming one: ``python -m pytest --checks=docs/checks.md``."""
    if request.config.getoption("checks"):
        pytest.skip("this run writes the page")
    checks = request.config.pluginmanager.get_plugin("checks")
    shown, declared = read(PAGE.read_text(encoding="utf-8")), set(checks.cells)
    assert not declared - shown, "not on the page"
    if checks.complete():
        assert not shown - declared, "on the page, but no test declares it"


def test_the_page_shows_no_failure():
    assert "**failed**" not in PAGE.read_text(encoding="utf-8")


def test_a_page_reads_back_as_its_cells():
    cells = {
        ("layer", "Linear", "gradients"): Cell(["passed", "passed"], [1e-7, 3e-7]),
        ("layer", "LSTM, GRU", "refused by name"): Cell(["passed"], []),
        ("engine", "bf16", "bit-identical"): Cell(["passed", "failed"], []),
        ("engine", "CUDA", "bit-identical"): Cell(["skipped"], []),
        ("engine", "CUDA", "same scores"): Cell(),
    }
    text = page(cells)
    assert read(text) == set(cells)
    assert "| Linear | ✓ 3.0e-07 |  |" in text
    assert "| LSTM, GRU |  | ✓ |" in text
    assert "| bf16 | **failed** |  |" in text
    assert "| CUDA | skipped | not run |" in text


TESTS = """
import pytest
from checks import measured

@pytest.mark.parametrize("kind", [int, float])
@pytest.mark.check("layer", "{kind}", "gradients")
def test_one(kind):
    measured(0.5 if kind is int else 0.25)
    assert kind is int

@pytest.mark.check("data", "tuples", "accepted")
@pytest.mark.check("data", "tuples", "counted")
def test_two():
    pass
"""


def run(tmp_path, text):
    """A pytest of its own, in which this directory's plugin is at work."""
    path = tmp_path / f"test_{tmp_path.name}.py"
    path.write_text(text)
    own = Path(__file__).parent
    arguments = ["-q", "-n", "0", "-p", "no:cacheprovider", "--rootdir", tmp_path, "-c", own.parent / "pyproject.toml"]
    options = ["--confcutdir", own, "--checks", tmp_path / "page.md", path]
    return pytest.main([*map(str, [*arguments, *options])], plugins=[conftest])


def test_a_run_writes_the_page(tmp_path):
    assert run(tmp_path, TESTS) == pytest.ExitCode.TESTS_FAILED
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| int | ✓ 0.5 |" in text
    assert "| float | **failed** |" in text
    assert "| | accepted | counted |" in text
    assert "| tuples | ✓ | ✓ |" in text


@pytest.mark.parametrize("mark", ['"layer", "{size}", "x"', '"other", "x", "x"', '"layer", "x"'])
def test_a_mark_that_names_no_cell_is_an_error(tmp_path, mark):
    text = f"import pytest\n\n@pytest.mark.check({mark})\ndef test_it(): pass\n"
    assert run(tmp_path, text) == pytest.ExitCode.USAGE_ERROR
