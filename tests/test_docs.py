"""The pages of the documentation: their code runs as it stands, and their links lead somewhere."""

import logging
import re
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers import Classifier, classes, quiet_trainer
from torch.utils.data import DataLoader

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def blocks_of(page: Path) -> list[str]:
    """A page's blocks of Python, each at its own lines, so that an error names the line of the page."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return ["\n" * text[: match.start(1)].count("\n") + match[1] for match in found]


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(classes(), 8)


def of_the_reader(tmp_path: Path) -> dict[str, object]:
    """What the README takes for granted: the reader's own module and data, and how a training of theirs is made."""
    torch.manual_seed(0)
    query = list(classes(4, seed=2).tensors)

    def build(kept, seed):
        loader = DataLoader(torch.utils.data.Subset(classes(), kept), 8)
        return Classifier(), loader, quiet_trainer(tmp_path, max_epochs=1)

    def margins(module):
        return -F.cross_entropy(module.net(query[0]), query[1], reduction="none")

    names = {"L": L, "model": Classifier(), "dm": Data(), "build": build, "margins": margins}
    return names | {"dataset": classes(), "train_dataset": classes(), "query": query, "query_batch": query}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=lambda page: page.name)
def test_the_code_of_a_page_runs(tmp_path, monkeypatch, page):
    pytest.importorskip("peft")
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem, **(of_the_reader(tmp_path) if page.stem == "README" else {})}
    for block in blocks_of(page):
        if page.stem == "README":  # a hundred retrainings in two processes would find nothing that four do not
            block = block.replace("random_subsets(100", "random_subsets(4").replace("range(5)", "range(1)")
            block = block.replace("n_jobs=4", "n_jobs=1")
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([\w-]+))?\)", text):
        linked = page.parent / target if target else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
