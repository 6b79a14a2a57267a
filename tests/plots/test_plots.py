"""Pictures show the numbers that they are given: what is drawn is read off the axes and held against arrays."""

import importlib
import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.utils.data import TensorDataset

from lightning_source import InfluenceScores, plots
from lightning_source._lightning import MisconfigurationException
from lightning_source.evaluation import SubsetRemoval, linear_datamodeling_score, plot_curves, random_subsets
from lightning_source.evaluation.curves import CosineCurve
from lightning_source.evaluation.mislabel import cost_curve

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")

TRAIN = TensorDataset(torch.rand(10, 1, 8, 8), torch.arange(10) % 3)
QUERY = [torch.rand(3, 8, 8), torch.tensor([2, 1, 0])]
METADATA = {"segments": [{"first": 0, "last": 5}, {"first": 5, "last": 9}]}


def scores_of(queries=3, examples=10, measurement="loss", segments=2, **changes):
    by_segment = torch.randn(segments, queries, examples, generator=torch.Generator().manual_seed(0))
    ids = {"train_ids": torch.arange(examples), "query_ids": torch.arange(queries)}
    fields = ids | {"by_segment": by_segment, "metadata": METADATA | {"measurement": measurement}} | changes
    return InfluenceScores(by_segment.sum(0), **fields)


def lds_of(lds=0.4, interval=(0.3, 0.5), control=(-0.1, 0.1), reliability=0.81):
    return SimpleNamespace(
        lds=torch.tensor(lds),
        interval=torch.tensor(interval),
        control_interval=torch.tensor(control),
        reliability=None if reliability is None else torch.tensor(reliability),
    )


def removal_of(flipped=(0.1, 0.5), random=(0.0, 0.25)):
    def around(shares):
        return torch.stack([torch.tensor(shares) - 0.0625, torch.tensor(shares) + 0.0625], 1)

    return SimpleNamespace(
        sizes=torch.tensor([1, 4]),
        flipped=torch.tensor(flipped),
        interval=around(flipped),
        random=torch.tensor(random),
        random_interval=around(random),
    )


CURVES = {"a": CosineCurve([1, 5], torch.tensor([0.5, 0.25]), torch.tensor([0.125, 0.25]))}
# Every function, as a call that draws on `ax`.
DRAW = {
    "examples": lambda ax=None: plots.plot_examples(scores_of(), train=TRAIN, query=QUERY, ax=ax),
    "segments": lambda ax=None: plots.plot_segment_shares(scores_of(), ax=ax),
    "layers": lambda ax=None: plots.plot_layer_shares(torch.rand(3, 4).softmax(0), ax=ax),
    "histogram": lambda ax=None: plots.plot_histogram(scores_of(), ax=ax),
    "concentration": lambda ax=None: plots.plot_concentration(scores_of(), ax=ax),
    "self-influence": lambda ax=None: plots.plot_self_influence(torch.rand(9), ax=ax),
    "mislabelled": lambda ax=None: plots.plot_self_influence(torch.rand(9), [0, 1] * 4 + [0], ax=ax),
    "lds": lambda ax=None: plots.plot_lds({"a": lds_of()}, ax=ax),
    "removal": lambda ax=None: plots.plot_removal({"a": removal_of()}, ax=ax),
    "further training": lambda ax=None: plots.plot_further_training(CURVES, ax=ax),
    "curves": lambda ax=None: plot_curves([1, 5], {"a": [0.5, 0.25]}, {}, ax),
    "spectrum": lambda ax=None: plots.plot_spectrum(torch.rand(9), 2.0, ax=ax),
    "tokens": lambda ax=None: plots.plot_tokens(torch.randn(2, 3), ax=ax),
    "scores": lambda ax=None: scores_of().plot(ax=ax),
}


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def line(ax, label):
    (found,) = [line for line in ax.get_lines() if line.get_label() == label]
    return found


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW.keys())
def test_the_axes_given_are_those_drawn_on(draw):
    figure, (own, other) = plt.subplots(1, 2)
    assert draw(own) is own
    assert not other.has_data()
    assert own.has_data() or own.child_axes
    assert plt.get_fignums() == [figure.number]
    figure.canvas.draw()


@pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW.keys())
def test_without_axes_there_is_a_new_figure(draw):
    plt.figure()
    assert draw().figure.number == 2


@pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW.keys())
def test_axes_of_another_kind_are_named(draw):
    figure, axes = plt.subplots(1, 2)
    for wrong in (figure, axes):
        with pytest.raises(MisconfigurationException, match=r"`ax` is of .*HINT"):
            draw(wrong)


@pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW.keys())
def test_a_missing_matplotlib_names_the_extra(monkeypatch, draw):
    for name in ("matplotlib", "matplotlib.pyplot", "matplotlib.axes"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MisconfigurationException, match=r'HINT: pip install "lightning_source\[plots\]"'):
        draw()


def test_the_import_does_without_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in [name for name in sys.modules if name.startswith("lightning_source.plots")]:
        monkeypatch.delitem(sys.modules, name)
    assert importlib.import_module("lightning_source.plots") is not plots


def test_these_are_all_functions_there_are():
    public = {name for name in vars(plots) if name.startswith("plot_")}
    assert public <= set(itertools.chain(*(draw.__code__.co_names for draw in DRAW.values())))


# ---------------------------------------------------------------- examples


@pytest.mark.parametrize("measurement", ["loss", "margin"])
def test_rows_of_examples(measurement):
    scores = scores_of(measurement=measurement)
    ax = plots.plot_examples(scores, train=TRAIN, query=QUERY, k=2, rows=[2, 0])
    cells = np.array(ax.child_axes).reshape(2, 5)
    assert [cell.get_title() for cell in cells[:, 0]] == ["#2, label 0", "#0, label 2"]
    assert [text.get_text() for text in ax.texts] == ["query", "helped most", "harmed most"]
    for drawn, row in zip(cells, [2, 0], strict=True):
        ids = torch.cat([scores.proponents(2)[1][row], scores.opponents(2)[1][row]])
        for cell, n in zip(drawn[1:], ids.tolist(), strict=True):
            score = float(scores.values[row, n])
            assert cell.get_title() == f"#{n}, label {n % 3}\n{score:+#.3g}"
            helped = score > 0 if measurement == "loss" else score < 0
            colour = matplotlib.colors.to_rgba("#0072b2" if helped else "#d55e00")
            assert cell.spines["left"].get_edgecolor() == colour
            assert matplotlib.colors.to_rgba(cell.title.get_color()) == colour
            (image,) = cell.images
            picture = TRAIN[n][0][0]
            expected = (picture - picture.min()) / (picture.max() - picture.min())
            np.testing.assert_allclose(image.get_array(), expected, rtol=1e-6)
        shown = drawn[0].images[0].get_array()
        assert np.corrcoef(shown.ravel(), QUERY[0][row].ravel())[0, 1] == pytest.approx(1)


def test_cells_neither_overlap_nor_leave_the_figure():
    ax = plots.plot_examples(scores_of(), train=TRAIN, query=QUERY, k=4)
    ax.figure.canvas.draw()
    boxes = [cell.get_tightbbox() for cell in ax.child_axes] + [text.get_window_extent() for text in ax.texts]
    assert len(boxes) == 3 * 9 + 3
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    whole = ax.figure.bbox
    assert all(whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1 for box in boxes)


def test_texts_are_shown_as_they_are_and_cut():
    texts = [{"text": f"{n} costs $\\frac$ " + "word " * 99, "label": "neither of these"} for n in range(10)]
    ax = plots.plot_examples(scores_of(), train=texts, query=texts[:3], k=1, rows=[0])
    ax.figure.canvas.draw()  # what mathtext cannot parse would fail here
    for cell in ax.child_axes:
        n = int(cell.get_title()[1])
        (text,) = cell.texts
        assert text.get_text().startswith(f"{n} costs $\\frac$ word")
        assert text.get_text().endswith("\n…")
        assert cell.get_title().startswith(f"#{n}, neither of …")
        inside, outside = text.get_window_extent(), cell.get_window_extent()
        assert outside.x0 < inside.x0
        assert inside.x1 < outside.x1
        assert outside.y0 < inside.y0


def test_render_ties_errors_and_how_many_queries():
    scores = scores_of(queries=9, examples=4, stderr=torch.full((9, 4), 0.25))
    scores.values[0] = 0.0
    seen = []
    ax = scores.plot(train=range(4), query=range(9), k=99, render=lambda example: seen.append(example) or "seen")
    assert len(ax.child_axes) == 8 * (1 + 2 * 4)
    assert ax.texts[0].get_text() == "8 of 9 queries"
    assert set(seen) == set(range(8))
    assert ax.child_axes[1].get_title().endswith("\n+0.00 ± 0.2")
    assert ax.child_axes[1].title.get_color() == "#808080"


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"k": 0}, "`k=0`"),
        ({"rows": [3]}, "3 queries' rows"),
        ({"rows": []}, "at least one"),
        ({"rows": [-1]}, r"rows=\[-1\]"),
        ({"train": iter([])}, "cannot be indexed. HINT"),
        ({"query": [torch.rand(2, 8, 8), torch.ones(2)]}, "nothing in it has 3 rows.*HINT"),
        ({"query": {"text": ["a", "b"]}}, "nothing in it has 3 rows.*HINT"),
    ],
)
def test_wrong_examples_are_named(wrong, named):
    with pytest.raises(MisconfigurationException, match=named):
        plots.plot_examples(scores_of(), **({"train": TRAIN, "query": QUERY} | wrong))


# ---------------------------------------------------------------- the matrix


def test_bars_of_segments_add_up():
    scores = scores_of(query_ids=torch.tensor([30, 10, 20]))
    ax = plots.plot_segment_shares(scores)
    sizes = scores.by_segment.abs().sum(2).numpy()
    heights = np.array([[bar.get_height() for bar in bars] for bars in ax.containers])
    np.testing.assert_allclose(heights, sizes / sizes.sum(0), rtol=1e-6)
    np.testing.assert_allclose([bar.get_y() for bar in ax.containers[1]], heights[0])
    assert legend(ax) == ["segment 1: steps 5 to 9", "segment 0: steps 0 to 5"]
    ax.figure.canvas.draw()
    ticks = zip(ax.get_xticks(), ax.get_xticklabels(), strict=True)
    assert {place: text.get_text() for place, text in ticks if text.get_text()} == {0: "30", 1: "10", 2: "20"}


def test_many_bars_and_segments_stay_legible():
    shares = torch.rand(30, 40).softmax(0)
    _, ax = plt.subplots(figsize=(2, 2))
    plots.plot_segment_shares(shares, ax=ax)
    ax.figure.canvas.draw()
    assert len(legend(ax)) == 10
    boxes = [text.get_window_extent() for text in ax.get_xticklabels() if text.get_text()]
    assert not [pair for pair in itertools.pairwise(boxes) if pair[0].overlaps(pair[1])]


@pytest.mark.parametrize("names", [["stem", "_head$^2$"], None])
def test_bars_of_layers_add_up_and_have_their_names(names):
    parts = torch.rand(2, 3, 10, generator=torch.Generator().manual_seed(1))
    ax = scores_of(by_segment=None, by_layer=parts, metadata={"layers": names}).plot()
    heights = np.array([[bar.get_height() for bar in bars] for bars in ax.containers])
    np.testing.assert_allclose(heights, (parts.sum(2) / parts.sum((0, 2))).numpy(), rtol=1e-5)
    expected = ["layer stem", r"layer _head\$^2\$"] if names else ["layer 0", "layer 1"]
    assert legend(ax) == expected[::-1]
    ax.figure.canvas.draw()


def test_scores_without_segments_or_layers_are_named():
    with pytest.raises(MisconfigurationException, match="per_segment=True"):
        plots.plot_segment_shares(scores_of(by_segment=None))
    with pytest.raises(MisconfigurationException, match="per_layer=True"):
        plots.plot_layer_shares(scores_of())


@pytest.mark.parametrize("measurement", ["loss", "margin"])
def test_bars_of_the_histogram_count_scores(measurement):
    scores = scores_of(queries=20, measurement=measurement)
    ax = scores.plot("histogram")
    counts, edges = np.histogram(
        scores.values.double(), 41, (-float(scores.values.abs().max()), float(scores.values.abs().max()))
    )
    bars = sorted(ax.patches, key=lambda bar: bar.get_x())
    assert [bar.get_height() for bar in bars] == counts.tolist()
    np.testing.assert_allclose([bar.get_x() for bar in bars], edges[:-1], rtol=1e-6)
    by_label = {bars.get_label(): bars for bars in ax.containers}
    helped = [bar.get_x() for bar in by_label["helped"]]
    assert (min(helped) > 0) if measurement == "loss" else (max(helped) < 0)


def test_concentration_is_the_share_of_the_largest():
    values = np.array([[4.0, -3.0, 2.0, 1.0], [0.0, 0.0, -5.0, 0.0]])
    ax = plots.plot_concentration(values)
    drawn = line(ax, "mean over queries")
    np.testing.assert_allclose(drawn.get_xdata(), [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(drawn.get_ydata(), [0, 0.7, 0.85, 0.95, 1])
    assert len(ax.collections) == 1
    (alone,) = [x for x in plots.plot_concentration(values[:1]).get_lines() if x.get_label() == "scores"]
    np.testing.assert_allclose(alone.get_ydata(), [0, 0.4, 0.7, 0.9, 1])
    assert len(line(plots.plot_concentration(torch.rand(2, 5000)), "mean over queries").get_xdata()) == 401


@pytest.mark.parametrize("draw", [plots.plot_histogram, plots.plot_concentration, plots.plot_segment_shares])
@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (torch.rand(3), r"has the shape \[3\]"),
        (torch.rand(0, 3), "not empty"),
        ([[float("nan"), 1.0]], "1 values of 2 that are NaN"),
        ("scores", "not an array"),
        ({"a": [1.0]}, "not an array"),
    ],
)
def test_wrong_matrices_are_named(draw, wrong, named):
    with pytest.raises(MisconfigurationException, match=named):
        draw(wrong)


def test_scores_that_are_all_zero_are_drawn():
    for draw in (plots.plot_histogram, plots.plot_concentration):
        draw(torch.zeros(2, 5)).figure.canvas.draw()


# ---------------------------------------------------------------- InfluenceScores.plot


@pytest.mark.parametrize(
    ("arguments", "drawn"),
    [
        ({"train": TRAIN, "query": QUERY}, lambda ax: len(ax.child_axes) == 33),
        ({"kind": "examples", "train": TRAIN, "query": QUERY, "k": 1}, lambda ax: len(ax.child_axes) == 9),
        ({}, lambda ax: ax.get_ylabel() == "share of the absolute score" and len(ax.containers) == 2),
        ({"kind": "concentration"}, lambda ax: ax.get_xlabel() == "training examples, largest scores first"),
        ({"kind": "histogram"}, lambda ax: ax.get_ylabel() == "number of scores"),
    ],
)
def test_the_sensible_picture_is_drawn(arguments, drawn):
    assert drawn(scores_of().plot(**arguments))


def test_without_segments_it_is_the_histogram():
    assert scores_of(by_segment=None).plot().get_ylabel() == "number of scores"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"train": TRAIN}, "'examples' was given train. HINT"),
        ({"query": QUERY}, "'examples' was given query. HINT"),
        ({"kind": "examples"}, "was given no examples. HINT"),
        ({"kind": "histogram", "query": QUERY, "train": TRAIN}, "'histogram' was given train and query. HINT"),
        (
            {"kind": "heatmap"},
            "no plot 'heatmap'. HINT: 'examples', 'segments', 'layers', 'histogram', 'concentration'",
        ),
    ],
)
def test_wrong_choices_are_named(arguments, named):
    with pytest.raises(MisconfigurationException, match=named):
        scores_of().plot(**arguments)


# ---------------------------------------------------------------- self-influence


def test_self_influence_falls():
    values = torch.tensor([1.0, 3.0, -0.5, 2.0])
    ax = plots.plot_self_influence(values)
    drawn = line(ax, "self-influence")
    assert drawn.get_ydata().tolist() == [3.0, 2.0, 1.0, -0.5]
    assert drawn.get_xdata().tolist() == [0.25, 0.5, 0.75, 1.0]
    assert ax.get_legend() is None
    assert legend(plots.plot_self_influence({"a": values, "b": [1, 2]})) == ["a", "b"]


def test_wrong_labels_are_found_as_the_metric_says():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(60, generator=generator).mul(12).floor()  # ties
    wrong = torch.rand(60, generator=generator) < 0.3
    ax = plots.plot_self_influence({"ours": values}, wrong)
    auc = roc_auc_score(wrong, values)
    (label,) = [label for label in legend(ax) if label.startswith("ours")]
    assert label == f"ours, AUC {auc:.3f}"
    drawn = line(ax, label)
    steps = np.linspace(0, 1, 61)
    found = np.interp(steps, drawn.get_xdata(), drawn.get_ydata())
    np.testing.assert_allclose(found, cost_curve(values, wrong.double()), rtol=0, atol=1e-6)
    assert line(ax, "chance").get_xydata().tolist() == [[0, 0], [1, 1]]
    assert line(ax, "perfect order").get_xdata()[1] == pytest.approx(float(wrong.double().mean()))


@pytest.mark.parametrize(
    ("values", "wrong", "named"),
    [
        ([1.0, 2.0], [0, 1, 1], "`mislabelled` has 3 entries, but `self-influence` is of 2"),
        ([1.0, 2.0], [0, 0], "both of them. HINT"),
        ([1.0, 2.0], [0, 2], "must hold 0"),
        ([[1.0, 2.0]], None, r"`self_influence` has the shape \[1, 2\]"),
        ({}, None, "an empty one"),
    ],
)
def test_wrong_self_influence_is_named(values, wrong, named):
    with pytest.raises(MisconfigurationException, match=named):
        plots.plot_self_influence(values, wrong)


# ---------------------------------------------------------------- measured


def test_lds_with_intervals_control_and_ceiling():
    ax = plots.plot_lds({"one": lds_of(), "two": lds_of(0.2, (0.1, 0.25), (-0.2, 0.3), None)})
    ax.figure.canvas.draw()
    assert [text.get_text() for text in ax.get_yticklabels()] == ["one", "two"]
    assert ax.yaxis_inverted()
    points = [x.get_xydata()[0].tolist() for x in ax.get_lines() if x.get_marker() == "o"]
    np.testing.assert_allclose(points, [[0.4, 0], [0.2, 1]])
    segments = [c.get_segments()[0].tolist() for c in ax.collections]
    expected = [[[0.3, 0], [0.5, 0]], [[0.9, -0.5], [0.9, 0.5]], [[0.1, 1], [0.25, 1]]]
    np.testing.assert_allclose(segments, expected, rtol=1e-6)
    fields = [(bar.get_x(), bar.get_width(), bar.get_y()) for bar in ax.patches]
    np.testing.assert_allclose(fields, [(-0.1, 0.2, -0.5), (-0.2, 0.5, 0.5)], rtol=1e-6)
    assert sorted(legend(ax)) == ["ceiling (√reliability)", "dealt at random (95 %)"]


def test_results_of_the_metrics_are_what_is_drawn():
    subsets = random_subsets(20, 8)
    truth = torch.randn(2, 20, 4)
    result = linear_datamodeling_score(torch.randn(4, 8), subsets, truth, resamples=20, controls=20)
    ax = plots.plot_lds({"own": result})
    (point,) = [x.get_xdata()[0] for x in ax.get_lines() if x.get_marker() == "o"]
    assert point == pytest.approx(float(result.lds))
    removal = SubsetRemoval([1, 4], resamples=20)
    removal.update(torch.tensor([[1.0, 1, 0, 1], [0, 0, 0, 1]]), torch.ones(2, 4))
    drawn = line(plots.plot_removal({"own": removal.compute()}), "own")
    assert drawn.get_xydata().tolist() == [[1, 0.25], [4, 0.75]]


def test_removal_curves_share_a_control():
    ax = plots.plot_removal({"a": removal_of(), "b": removal_of((0.25, 0.75)), "c": removal_of(random=(0.5, 0.5))})
    assert [x.get_label() for x in ax.get_lines()] == ["a", "b", "c", "random", "random, beside c"]
    np.testing.assert_allclose(line(ax, "a").get_xydata(), [[1, 0.1], [4, 0.5]], rtol=1e-6)
    assert line(ax, "random").get_xydata().tolist() == [[1, 0.0], [4, 0.25]]
    band = ax.collections[1].get_paths()[0].vertices
    assert {tuple(point) for point in band.tolist()} == {(1, 0.1875), (1, 0.3125), (4, 0.6875), (4, 0.8125)}


def test_further_training_over_epochs():
    ax = plots.plot_further_training(CURVES | {"b": SimpleNamespace(epochs=[1, 10], mean=[0, 1], sem=None)})
    assert ax.get_xscale() == "log"
    assert line(ax, "a").get_xydata().tolist() == [[1, 0.5], [5, 0.25]]
    assert line(ax, "b").get_xydata().tolist() == [[1, 0], [10, 1]]
    (band,) = ax.collections
    points = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    assert points == {(1, 0.375), (1, 0.625), (5, 0.0), (5, 0.5)}


def test_many_curves_are_told_apart_and_named_beside_the_axes():
    few, many = ({f"method {n}": CURVES["a"] for n in range(count)} for count in (2, 14))
    for curves in (few, many):
        ax = plots.plot_further_training(curves)
        ax.figure.canvas.draw()
        assert len({(x.get_color(), x.get_linestyle()) for x in ax.get_lines()[: len(curves)]}) == len(curves)
        beside = ax.get_legend().get_window_extent().x0 > ax.get_window_extent().x1
        assert beside == (curves is many)
        assert ax.get_legend().get_window_extent().x1 <= ax.figure.bbox.x1


@pytest.mark.parametrize("draw", [plots.plot_lds, plots.plot_removal, plots.plot_further_training])
@pytest.mark.parametrize("wrong", [{}, [lds_of()], lds_of()])
def test_what_is_no_mapping_is_named(draw, wrong):
    with pytest.raises(MisconfigurationException, match=r"must be a mapping of names to results.*HINT"):
        draw(wrong)


# ---------------------------------------------------------------- curvature


@pytest.mark.parametrize(("rate", "decay"), [(2.0, 0.0), (0.5, 0.25)])
def test_responses_over_the_spectrum(rate, decay):
    values = torch.cat([torch.logspace(-3, 2, 50), torch.tensor([0.0, -1e-9])]).reshape(2, 26)
    ax = plots.plot_spectrum(values, rate, decay)
    twin = ax.figure.axes[-1]
    assert len(ax.figure.axes) == 2
    response, left = twin.get_lines()[:2]
    sigma = response.get_xdata()
    shifted = sigma + decay
    np.testing.assert_allclose(response.get_ydata(), (1 - np.exp(-rate * shifted)) / shifted / rate, rtol=1e-6)
    np.testing.assert_allclose(left.get_ydata(), np.exp(-rate * shifted), rtol=1e-9)
    assert twin.get_lines()[2].get_xdata()[0] == 1 / rate
    (bars,) = ax.patches
    shares, edges, _ = bars.get_data()
    counted = np.histogram(values.double().clamp_min(edges[0]).numpy(), edges)[0]
    assert shares.sum() == pytest.approx(1)
    np.testing.assert_allclose(shares, counted / 52, rtol=1e-9)
    assert legend(twin)[0] == "eigenvalues"


def test_blocks_of_a_spectrum_are_told_apart():
    blocks = {f"block {n}": torch.rand(7) + 0.1 for n in range(15)}
    ax = plots.plot_spectrum(blocks, 1.0)
    assert len(ax.patches) == 15
    assert legend(ax.figure.axes[-1])[:8] == [f"block {n}" for n in range(0, 15, 2)]
    plots.plot_spectrum(torch.zeros(3), 1.0).figure.canvas.draw()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (([1.0], 0.0), "`rate=0.0` must be positive"),
        (([1.0], 1.0, -1.0), "`weight_decay=-1.0` not negative"),
        (([1.0], float("inf")), "finite"),
        (([float("inf")], 1.0), "infinite"),
        (([], 1.0), "not empty"),
        ((["a"], 1.0), "not an array of numbers"),
    ],
)
def test_wrong_spectra_are_named(arguments, named):
    with pytest.raises(MisconfigurationException, match=named):
        plots.plot_spectrum(*arguments)
