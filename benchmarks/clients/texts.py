"""A text for the libraries that read."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def words() -> None:
    """Put this project's page on its method where Lightning's demos look for a text, in a folder of its own."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "method.md").read_text()
    os.chdir(tempfile.mkdtemp())
    Path("data").mkdir()
    Path("data/wikitext-2.txt").write_text(text[:12_000])
