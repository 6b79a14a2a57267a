"""The page is one safe file: hostile texts stay texts, numbers are those of the scores, a browser does not complain."""

import importlib.util
import json
import re
import shutil
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from lightning_source import InfluenceScores
from lightning_source._lightning import MisconfigurationException
from lightning_source.report.examples import query_example, shown

pytest.importorskip("jinja2")
pytest.importorskip("PIL")

HOSTILE = [
    "</script><script>window.hit=1</script>",
    '"><img src=x onerror="window.hit=1">',
    "'; window.hit=1; //",
    "</style><style>body{display:none}</style>",
    "javascript:window.hit=1",
    "{{ 7 * 7 }} {% raw %}",
    "<!--<script>",
    "\u2028window.hit=1\u2029",
    "=HYPERLINK(1)",
    "../../etc/passwd\0",
]


class Texts(Dataset):
    def __len__(self):
        return len(HOSTILE)

    def __getitem__(self, index):
        return {"text": HOSTILE[index], "label": HOSTILE[-1 - index]}


def scores_of(queries=3, examples=10, measurement="loss", segments=2):
    by_segment = torch.randn(segments, queries, examples, generator=torch.Generator().manual_seed(0))
    metadata = {"method": HOSTILE[0], "measurement": measurement, "segments": [{"first": 0, "last": 5, "rates": [0.1]}]}
    ids, rows = torch.arange(examples), torch.arange(queries)
    return InfluenceScores(by_segment.sum(0), ids, rows, by_segment, metadata)


def data_in(path):
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), re.S).group(1))


@pytest.fixture
def hostile(tmp_path):
    path = tmp_path / "a 'b' <c>&.html"
    query = [{"text": text} for text in HOSTILE[:3]]
    scores = scores_of()
    parts = (scores.values / len(HOSTILE)).expand(len(HOSTILE), -1, -1)
    replace(scores, by_layer=parts, metadata=scores.metadata | {"layers": HOSTILE}).report(
        path,
        train=Texts(),
        query=query,
        k=len(HOSTILE),
        title=HOSTILE[0],
        predictions=HOSTILE[:3],
        self_influence=torch.rand(len(HOSTILE)),
    )
    return path


def test_hostile_texts_stay_texts(hostile):
    text = hostile.read_text()
    assert len(re.findall(r"<script", text)) == 2
    assert len(re.findall(r"</script>", text)) == 2
    assert len(re.findall(r"<style|<img", text)) == 1
    assert "{{ 7 * 7 }}" in text
    data = data_in(hostile)
    assert [data["examples"][str(n)]["text"] for n in range(len(HOSTILE))] == HOSTILE
    assert [entry["prediction"] for entry in data["queries"]] == HOSTILE[:3]
    assert [name for name, _ in data["layers"][0]] == HOSTILE


def test_the_file_names_nothing_outside_itself(hostile):
    text = hostile.read_text()
    assert "default-src 'none'" in text
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", text)


@pytest.mark.parametrize("measurement", ["loss", "margin"])
def test_the_lists_are_the_scores_own(tmp_path, measurement):
    scores = scores_of(measurement=measurement)
    scores.report(tmp_path / "r.html", train=Texts(), query=Texts(), k=4)
    data = data_in(tmp_path / "r.html")
    for side, (values, ids) in {"helpful": scores.proponents(4), "harmful": scores.opponents(4)}.items():
        for q, tops in enumerate(data["tops"]):
            assert [row[0] for row in tops[side]] == ids[q].tolist()
            assert [row[1] for row in tops[side]] == pytest.approx(values[q].tolist())
    torch.testing.assert_close(torch.tensor(data["shares"]), scores.segment_shares().T)
    assert sum(data["histogram"]["counts"]) == scores.values.numel()


@pytest.mark.parametrize("count", [2, 13, 40])
def test_layers_are_the_twelve_largest_and_the_rest(tmp_path, count):
    parts = torch.randn(count, 3, 10, generator=torch.Generator().manual_seed(2))
    names = [HOSTILE[0], *(f"layer.{index}" for index in range(1, count))]
    scores = replace(scores_of(), by_layer=parts, metadata={"layers": names})
    scores.report(tmp_path / "r.html", train=Texts(), query=Texts())
    for found, shares in zip(data_in(tmp_path / "r.html")["layers"], scores.layer_shares().T.tolist(), strict=True):
        largest = sorted(sorted(range(count), key=lambda index: -shares[index])[:12])
        assert [name for name, _ in found[:12]] == [names[index] for index in largest]
        assert [share for _, share in found[:12]] == pytest.approx([shares[index] for index in largest])
        others = {13: ["1 other layer"], 40: ["28 other layers"]}.get(count, [])
        assert [name for name, _ in found[12:]] == others
        assert sum(share for _, share in found) == pytest.approx(1)


def test_pictures_and_sums_by_label(tmp_path):
    labels = torch.arange(10) % 3
    train = TensorDataset(torch.rand(10, 1, 8, 8), labels)
    scores = scores_of(queries=2)
    scores.report(tmp_path / "r.html", train=train, query=[torch.rand(2, 3, 8, 8), torch.tensor([1, 2])])
    data = data_in(tmp_path / "r.html")
    assert all(entry["image"].startswith("data:image/png;base64,") for entry in data["examples"].values())
    assert [entry["label"] for entry in data["queries"]] == ["1", "2"]
    assert data["classes"]["labels"] == [0, 1, 2]
    expected = torch.stack([scores.values[:, labels == label].sum(1) for label in range(3)], 1)
    torch.testing.assert_close(torch.tensor(data["classes"]["sums"]), expected)


def test_many_queries_stay_small(tmp_path):
    pictures = torch.rand(1000, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    scores = InfluenceScores(torch.randn(200, 1000), torch.arange(1000), torch.arange(200))
    scores.report(tmp_path / "r.html", train=TensorDataset(pictures), query=pictures[:200])
    assert (tmp_path / "r.html").stat().st_size < 10_000_000


def test_a_missing_extra_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    with pytest.raises(MisconfigurationException, match=r"pip install 'lightning_source\[report\]'"):
        scores_of().report(tmp_path / "r.html", train=Texts(), query=Texts())


@pytest.mark.parametrize(
    ("wrong", "named"), [({"predictions": [1]}, "predictions"), ({"self_influence": torch.rand(2)}, "self_influence")]
)
def test_wrong_lengths_are_named(tmp_path, wrong, named):
    with pytest.raises(MisconfigurationException, match=named):
        scores_of().report(tmp_path / "r.html", train=Texts(), query=Texts(), **wrong)


class Retrained(NamedTuple):
    """As ``linear_datamodeling_score`` gives it."""

    lds: torch.Tensor = torch.tensor(0.4)
    interval: torch.Tensor = torch.tensor([0.3, 0.5])
    control_interval: torch.Tensor = torch.tensor([-0.1, 0.1])
    reliability: torch.Tensor | None = torch.tensor(0.81)


@pytest.fixture
def full(tmp_path):
    """Pictures with labels, one of them twice, and all that the page can say of scores."""
    pictures = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures[3] = pictures[2]
    scores = scores_of()
    bar = {"over": "snapshots", "degrees": 5}
    left_out = [["head.scale", 0.25, "complex numbers"]]
    scores = replace(
        scores,
        stderr=scores.values.abs() / 10,
        by_layer=(scores.values / 20).expand(20, -1, -1),
        metadata={
            **scores.metadata,
            "error_bar": bar,
            "coverage": 0.75,
            "left_out": left_out,
            "layers": [f"blocks.{index}" for index in range(20)],
        },
    )
    scores.report(
        tmp_path / "full.html",
        train=TensorDataset(pictures, torch.arange(10) % 3),
        query=[pictures[:3], torch.tensor([1, 2, 1])],
        self_influence=torch.rand(10),
        losses=[0.1, 0.2, 0.3],
        validation=Retrained(),
    )
    return tmp_path / "full.html", scores


def test_errors_coverage_and_retraining_are_on_the_page(full):
    path, scores = full
    data = data_in(path)
    for q, tops in enumerate(data["tops"]):
        for train, value, column, error in (*tops["helpful"], *tops["harmful"]):
            assert (value, error) == pytest.approx((float(scores.values[q, column]), float(scores.stderr[q, column])))
            assert int(scores.train_ids[column]) == train
    assert ["not attributed: head.scale", "25.0% of the parameters, complex numbers"] in data["header"]
    assert ["± at a score", "its standard error over snapshots"] in data["header"]
    assert data["validation"] == {
        "lds": pytest.approx(0.4),
        "interval": pytest.approx([0.3, 0.5]),
        "control": pytest.approx([-0.1, 0.1]),
        "ceiling": pytest.approx(0.9),
    }
    assert data["segments"] == ["segment 0", "segment 1"]  # of which the metadata know one only


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        (({"age": 31, "<b>": 0.5}, 1), {"cells": [["age", "31"], ["<b>", "0.5"]], "label": "1"}),
        ((torch.zeros(1, 4, 4), 1), "image"),
        ((torch.zeros(300), 1), {"wave": [[0.0, 0.0]] * 160, "label": "1"}),
        ((torch.zeros(30), 1), "text"),
        ({"text": "abc", "label": 1}, {"text": "abc", "label": "1"}),
    ],
    ids=["a row", "a picture", "a waveform", "numbers", "a text"],
)
def test_how_an_example_is_shown_is_guessed(example, expected):
    found = shown(example, None, 8)
    assert set(found) == {expected, "label"} if isinstance(expected, str) else found == expected


def test_a_waveform_is_its_outline():
    wave = torch.linspace(-0.5, 0.25, 320)
    outline = torch.tensor(shown(wave[None], None, 8)["wave"])
    torch.testing.assert_close(outline, wave.view(160, 2) / 0.5, rtol=0, atol=1e-3)  # three decimals


@pytest.mark.parametrize("page", ["hostile", "full"])
def test_every_control_in_a_browser(request, page):
    found = request.getfixturevalue(page)
    path = found[0] if isinstance(found, tuple) else found
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no chromium is installed")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(argument)
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.get(path.as_uri())
        for view in ("#overview", "#query-0", "#query-2", "#query-99"):
            driver.execute_script("location.hash = arguments[0]", view)
            for index in range(len(driver.find_elements("css selector", "button, a, input[type=checkbox], summary"))):
                controls = driver.find_elements("css selector", "button, a, input[type=checkbox], summary")
                if index < len(controls):
                    driver.execute_script("arguments[0].click()", controls[index])
        if page == "full":
            driver.execute_script("location.hash = '#overview'")
            said = driver.find_element("id", "main").text
            for part in ("Sum of scores by label", "Held against retraining", "0.400", "Scores against loss", "±"):
                assert (part in said) is (part != "±")  # errors are of single queries
            driver.execute_script("location.hash = '#query-0'")
            said = driver.find_element("id", "main").text
            for part in ("±", "When: share of each segment", "Where: share of each layer", "8 other layers\n40.0%"):
                assert part in said
            assert said.count("looks like ") == 2  # all ten examples are in both lists
        driver.execute_script("location.hash = '#query-1'")
        driver.find_element("id", "next").click()
        assert driver.execute_script("return location.hash") == "#query-2"
        assert driver.execute_script("return document.querySelector('#list a[aria-current]').dataset.q") == "2"
        driver.find_element("id", "search").send_keys("no such query")
        assert not [link for link in driver.find_elements("css selector", "#list a") if link.is_displayed()]
        assert driver.execute_script("return window.hit") is None
        assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
        sent = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]
        assert [url for url in urls if not url.startswith(("file:", "data:", "blob:"))] == []
    finally:
        driver.quit()


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ([torch.arange(6).view(3, 2), torch.tensor([7, 8, 9])], [[2, 3], 8]),
        ([["a", "b", "c"], torch.tensor([7, 8, 9])], ["b", 8]),
        (
            {"text": ["a", "b", "c"], "ids": torch.tensor([7, 8, 9]), "name": "all"},
            {"text": "b", "ids": 8, "name": "all"},
        ),
        ([{"x": torch.arange(3)}, torch.tensor([7, 8, 9])], [{"x": 1}, 8]),
        ([{"text": "a"}, {"text": "b"}, {"text": "c"}], {"text": "b"}),
        (["a", "b", "c"], "b"),
        (torch.arange(3), 1),
    ],
)
def test_the_second_of_three_queries(batch, expected):
    def plain(value):
        if isinstance(value, torch.Tensor):
            return value.tolist()
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items()}
        return [plain(part) for part in value] if isinstance(value, list) else value

    assert plain(query_example(batch, torch.arange(3), 1)) == expected


class Indexed:
    """No torch dataset, and no batch."""

    def __getitem__(self, index):
        return {"text": "abc"[index]}


def test_whatever_can_be_indexed_is_a_dataset():
    assert query_example(Indexed(), torch.tensor([2, 0]), 0) == {"text": "c"}
