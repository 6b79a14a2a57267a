"""The picture of one pair's score by tokens: its colours are the parts, its names the texts."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_source.plots import plot_tokens
from lightning_source.plots.canvas import HARMED, HELPED

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
from matplotlib.colors import to_rgb  # noqa: E402 - behind the check

PARTS = torch.tensor([[2.0, -1.0, 0.0], [0.5, -2.0, 1.0]])


@pytest.mark.parametrize(("lower", "positive", "negative"), [(True, HELPED, HARMED), (False, HARMED, HELPED)])
def test_the_largest_parts_have_the_colour_of_their_side(lower, positive, negative):
    (image,) = plot_tokens(PARTS, lower_is_better=lower).get_images()
    assert image.get_array().tolist() == PARTS.tolist()
    shades = image.to_rgba(image.get_array())
    assert shades[0, 0, :3] == pytest.approx(to_rgb(positive), abs=0.01)
    assert shades[1, 1, :3] == pytest.approx(to_rgb(negative), abs=0.01)
    assert shades[0, 2, :3] == pytest.approx((1, 1, 1), abs=0.02)  # one step of 256 from the middle


def test_texts_name_rows_and_columns():
    ax = matplotlib.pyplot.figure().add_subplot()
    assert plot_tokens(PARTS, ["the", "a\n$b$"], ["x" * 40, "y", "z"], ax=ax) is ax
    assert [label.get_text() for label in ax.get_yticklabels()] == ["the", r"a⏎\$b\$"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["x" * 15 + "…", "y", "z"]


def test_wrong_input_is_named():
    with pytest.raises(MisconfigurationException, match="`query` has 3 texts for 2 elements"):
        plot_tokens(PARTS, ["a", "b", "c"])
    with pytest.raises(MisconfigurationException, match=r"`parts` has the shape \[3\]"):
        plot_tokens(PARTS[0])
    with pytest.raises(MisconfigurationException, match="NaN"):
        plot_tokens(PARTS * float("nan"))
