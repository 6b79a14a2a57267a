"""The examples in the package's docstrings do what they say, and what its pages cite is there."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "lightning_source"
SOURCES = {path: path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
WITH_EXAMPLES = [
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path, text in SOURCES.items() if ">>>" in text
]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_of_a_module(name):
    module = importlib.import_module(name)
    results = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.attempted
    assert not results.failed


def test_sections_that_docstrings_cite_are_in_the_page():
    page = (REPOSITORY / "docs" / "method.md").read_text()
    headings = set(re.findall(r"^#+ ([\d.]*\d)\.? ", page, re.MULTILINE))
    cited = {number for text in SOURCES.values() for number in re.findall(r"method\s+§([\d.]*\d)", text)}
    assert cited
    assert cited <= headings


@pytest.mark.parametrize("page", ["method.md", "architecture.md"])
def test_tests_and_files_that_pages_cite_exist(page):
    text = (REPOSITORY / "docs" / page).read_text()
    defined = "\n".join(path.read_text() for path in (REPOSITORY / "tests").rglob("test_*.py"))
    tests = set(re.findall(r"`(test_\w+)`", text))
    assert {name for name in tests if f"def {name}(" not in defined} == set()
    links = set(re.findall(r"\]\((?!https?:|#)([^)#]+)", text))
    assert {link for link in links if not (REPOSITORY / "docs" / link).exists()} == set()
