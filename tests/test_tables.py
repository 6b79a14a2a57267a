"""Scores as tables of pandas and Arrow, with columns of the training dataset, and as HTML."""

import json
import sys
from html.parser import HTMLParser

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_source import InfluenceScores

pandas = pytest.importorskip("pandas")
arrow = pytest.importorskip("pyarrow")


def scores(queries=3, examples=6, **metadata):
    generator = torch.Generator().manual_seed(0)
    return InfluenceScores(
        torch.randn(queries, examples, generator=generator),
        torch.tensor([9, 2, 4, 0, 7, 5])[:examples],  # of a dataset of 10
        torch.arange(10, 10 + queries),
        metadata={"method": "source", "measurement": "loss", "sign": "up", "unit": "nats"} | metadata,
    )


class Texts(Dataset):
    """A dataset of mappings, which says what was read of it."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return 10

    def __getitem__(self, n):
        self.read.append(n)
        return {"text": f"text {n}", "label": torch.tensor(n % 3), "embedding": torch.tensor([n, 2.0 * n])}


# ---------------------------------------------------------------- rows


def test_arrow_has_the_rows_of_pandas():
    table, frame = scores().to_arrow(2), scores().to_pandas(2)
    assert table.column_names == list(frame.columns)
    assert table.drop_columns("stderr").to_pylist() == frame.drop(columns="stderr").to_dict("records")
    assert table.schema.field("stderr").type == arrow.float64()
    assert table["stderr"].null_count == len(frame) == 3 * 2 * 2
    assert json.loads(table.schema.metadata[b"influence_scores"]) == scores().metadata


def test_all_pairs_in_arrow_are_the_matrix():
    one = scores()
    table = one.to_arrow()
    assert "stderr" not in table.column_names
    back = table.to_pandas().pivot(index="query", columns="train", values="score")
    pandas.testing.assert_frame_equal(back, one.to_pandas().sort_index(axis=1))
    with_bars = InfluenceScores(one.values, one.train_ids, one.query_ids, stderr=one.values.abs())
    assert with_bars.to_arrow()["stderr"].to_pylist() == one.values.abs().flatten().tolist()


def test_parquet_keeps_the_table(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = scores().to_arrow(1, train=Texts(), columns=["text"])
    parquet.write_table(table, tmp_path / "scores.parquet")
    assert parquet.read_table(tmp_path / "scores.parquet").equals(table, check_metadata=True)


# ---------------------------------------------------------------- columns of the training dataset


@pytest.mark.parametrize("kind", ["to_pandas", "to_arrow"])
def test_columns_of_a_dataset_of_mappings_are_joined(kind):
    dataset = Texts()
    table = getattr(scores(), kind)(2, train=dataset, columns=["text", "label"])
    rows = table.to_dict("records") if kind == "to_pandas" else table.to_pylist()
    assert [row["train_text"] for row in rows] == [f"text {row['train']}" for row in rows]
    assert [row["train_label"] for row in rows] == [row["train"] % 3 for row in rows]
    assert "train_embedding" not in rows[0]
    assert sorted(dataset.read) == sorted({row["train"] for row in rows})  # each once, and no other


def test_all_columns_are_joined_by_default():
    table = scores().to_arrow(1, train=DataLoader(Texts()))
    assert table.column_names[-3:] == ["train_text", "train_label", "train_embedding"]
    assert table["train_embedding"].to_pylist() == [[n, 2.0 * n] for n in table["train"].to_pylist()]


def test_all_pairs_can_be_joined():
    table = scores().to_arrow(train=Texts(), columns=["label"])
    assert len(table) == 18
    assert table["train_label"].to_pylist() == [n % 3 for n in table["train"].to_pylist()]


def test_a_data_frame_is_a_dataset():
    frame = pandas.DataFrame({"text": [f"text {n}" for n in range(10)], "query": range(10)}, index=range(100, 110))
    rows = scores().to_pandas(2, train=frame)
    assert rows["train_text"].tolist() == [f"text {n}" for n in rows["train"]]
    assert rows["train_query"].tolist() == rows["train"].tolist()  # by position, and beside the scores' own column


def test_datasets_of_hugging_face_are_read_by_column():
    datasets = pytest.importorskip("datasets")
    columns = {"text": [f"text {n}" for n in range(10)], "label": [n % 3 for n in range(10)]}
    dataset = datasets.Dataset.from_dict(columns).with_format("torch")
    rows = scores().to_arrow(2, train=dataset, columns=["label"]).to_pylist()
    assert [row["train_label"] for row in rows] == [row["train"] % 3 for row in rows]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"columns": ["text"]}, "HINT: pass it, too: `train=dataset`"),
        ({"train": Texts(), "columns": ["txt"]}, "no column `txt`. HINT: it has `text`, `label`, `embedding`"),
        ({"train": TensorDataset(torch.zeros(10, 2))}, "the examples of `TensorDataset` are of type `tuple`"),
        ({"train": pandas.DataFrame({"text": ["a"] * 9})}, "`train` has 9 examples, .* with the id 9"),
    ],
)
def test_what_cannot_be_joined_is_refused(arguments, message):
    for kind in ("to_pandas", "to_arrow"):
        with pytest.raises(Exception, match=message):
            getattr(scores(), kind)(6, **arguments)


def test_the_whole_matrix_takes_no_columns():
    with pytest.raises(Exception, match=r"HINT: `to_pandas\(k\)`"):
        scores().to_pandas(train=Texts())


@pytest.mark.parametrize(("kind", "package"), [("to_pandas", "pandas"), ("to_arrow", "pyarrow")])
def test_a_missing_package_is_named(monkeypatch, kind, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Exception, match=rf"`{kind}` needs {package}.*HINT: .*lightning_source\[tables\]"):
        getattr(scores(), kind)(1)


# ---------------------------------------------------------------- HTML


class Cells(HTMLParser):
    """The rows of all tables, as texts."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.open, self.tags = [], [], set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert not attrs
        self.tags.add(tag)
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data


def test_html_shows_the_strongest_examples():
    one = scores(queries=7)
    parsed = Cells(one._repr_html_())
    assert parsed.rows[:6] == [
        ["queries", "7"],
        ["training examples", "6"],
        ["method", "source"],
        ["measurement", "loss"],
        ["unit", "nats"],
        ["sign", "up"],
    ]
    assert [row[0] for row in parsed.rows[7:]] == ["10", "11", "12", "13", "14"]
    for side, place in (("proponents", 1), ("opponents", 2)):
        values, ids = getattr(one, side)(5)
        listed = [f"#{n}\xa0({value:+.3g})" for n, value in zip(ids[4].tolist(), values[4].tolist(), strict=True)]
        assert parsed.rows[-1][place].split(" ")[:-1] == listed
    assert "and 2 more queries" in one._repr_html_()
    assert "more" not in scores()._repr_html_()


def test_html_escapes_what_metadata_say():
    text = scores(method="<script>alert(1)</script>", measurement='"&<b>', unit=["<i>"], sign={"<u>": 1})._repr_html_()
    parsed = Cells(text)
    assert parsed.tags == {"table", "tr", "th", "td"}
    assert parsed.rows[2:6] == [
        ["method", "<script>alert(1)</script>"],
        ["measurement", '"&<b>'],
        ["unit", "['<i>']"],
        ["sign", "{'<u>': 1}"],
    ]


@pytest.mark.parametrize(("queries", "examples"), [(0, 6), (2, 0), (1, 1)])
def test_html_of_few_scores(queries, examples):
    one = InfluenceScores(torch.zeros(queries, examples), torch.arange(examples), torch.arange(queries))
    assert len(Cells(one._repr_html_()).rows) == 3 + (queries if examples else 0)
