"""Score files: damaged and foreign ones are refused by name, and those of earlier versions still load."""

import json
import re

import pytest
import torch
from helpers import classes, fitted
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file, save_file

from lightning_source import InfluenceScores
from lightning_source.ensembling import ensemble

QUERY = [x[:4] for x in classes(8, seed=2).tensors]
SCORES = InfluenceScores(torch.randn(2, 3), torch.arange(3), torch.arange(2), torch.randn(4, 2, 3), {"method": "m"})


def tensors(**changes):
    named = {"values": SCORES.values, "train_ids": SCORES.train_ids, "query_ids": SCORES.query_ids}
    return {name: value for name, value in (named | changes).items() if value is not None}


def written(path, named, metadata='{"method": "m"}'):
    save_file(named, path, None if metadata is None else {"influence_scores": metadata})


FILES = {
    "text": (lambda path: path.write_text("scores: 1, 2, 3\n" * 20), "damaged"),
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "a folder": (lambda path: path.mkdir(), "damaged"),
    "other tensors": (lambda path: save_file({"weight": torch.ones(2)}, path), "has no `influence_scores`"),
    "metadata that is no JSON": (lambda path: written(path, tensors(), "{"), "damaged"),
    "metadata that is a list": (lambda path: written(path, tensors(), "[1]"), "its `influence_scores` is no object"),
    "no tensors": (lambda path: written(path, {}), "its tensors are none"),
    "no values": (lambda path: written(path, tensors(values=None)), "its tensors are `query_ids`, `train_ids`"),
    "a wrong key": (lambda path: written(path, tensors(value=torch.ones(1))), "`value`, `values`"),
    "one query": (lambda path: written(path, tensors(values=torch.ones(3))), r"`values` has the shape \[3\]"),
    "other ids": (lambda path: written(path, tensors(train_ids=torch.arange(4))), r"`train_ids` has the shape \[4\]"),
    "shares of other queries": (
        lambda path: written(path, tensors(by_segment=torch.ones(4, 3, 3))),
        r"`by_segment` has the shape \[4, 3, 3\], which is not \[S, Q, N\]",
    ),
    "weights of other examples": (
        lambda path: written(path, tensors(kernel_weights=torch.ones(2))),
        r"`kernel_weights` has the shape \[2\]",
    ),
    "ids that are no integers": (lambda path: written(path, tensors(query_ids=torch.ones(2))), "of torch.float32"),
    "values that are integers": (
        lambda path: written(path, tensors(values=torch.ones(2, 3, dtype=torch.int64))),
        "of torch.int64",
    ),
    "earlier weights that are no numbers": (
        lambda path: written(path, tensors(), '{"method": "trak", "weights": ["a", "b", "c"]}'),
        "damaged",
    ),
    "earlier weights of other examples": (
        lambda path: written(path, tensors(), '{"method": "trak", "weights": [1.0]}'),
        r"`kernel_weights` has the shape \[1\]",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_holds_no_scores_is_refused_by_name(tmp_path, kind):
    write, complaint = FILES[kind]
    write(tmp_path / "s.safetensors")
    expected = re.escape(f"`{tmp_path / 's.safetensors'}` holds no influence scores: ")
    with pytest.raises(MisconfigurationException, match=rf"{expected}.*{complaint}"):
        InfluenceScores.load(tmp_path / "s.safetensors")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.999])
def test_a_truncated_file_is_refused(tmp_path, share):
    SCORES.save(tmp_path / "s.safetensors")
    whole = (tmp_path / "s.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(MisconfigurationException, match=r"cut\.safetensors` holds no influence scores: it is damaged"):
        InfluenceScores.load(tmp_path / "cut.safetensors")


def test_a_file_that_is_not_there_is_just_that(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        InfluenceScores.load(tmp_path / "none.safetensors")


@pytest.fixture(scope="module")
def trak(tmp_path_factory):
    trainer = fitted(tmp_path_factory.mktemp("trak"), max_epochs=5)
    return trainer, [trainer.attribute(QUERY, method="trak", dimension=9, seed=seed) for seed in (0, 1)]


def test_the_weights_of_trak_are_a_tensor_of_the_file(tmp_path, trak):
    trainer, (scores, _) = trak
    probabilities = trainer.lightning_module.eval().net(classes().tensors[0]).softmax(1).detach()
    slopes = probabilities[torch.arange(24), classes().tensors[1]] - 1
    torch.testing.assert_close(scores.kernel_weights, slopes)
    assert scores.metadata["dimension"] == 9
    assert "weights" not in scores.metadata
    scores.save(tmp_path / "s.safetensors")
    assert torch.equal(load_file(tmp_path / "s.safetensors")["kernel_weights"], scores.kernel_weights)
    assert torch.equal(InfluenceScores.load(tmp_path / "s.safetensors").kernel_weights, scores.kernel_weights)
    some = trainer.attribute(QUERY, method="trak", dimension=9, train_ids=[7, 2])
    assert torch.equal(some.kernel_weights, scores.kernel_weights[[7, 2]])


def test_weights_that_an_earlier_version_wrote_are_read_and_averaged(tmp_path, trak):
    """That one kept them as numbers in the metadata."""
    _, members = trak
    expected = ensemble(members)
    loaded = []
    for index, member in enumerate(members):
        metadata = json.dumps(member.metadata | {"weights": member.kernel_weights.tolist()})
        named = tensors(values=member.values, train_ids=member.train_ids, query_ids=member.query_ids)
        written(tmp_path / f"{index}.safetensors", named, metadata)
        loaded.append(InfluenceScores.load(tmp_path / f"{index}.safetensors"))
    for earlier, member in zip(loaded, members, strict=True):
        assert torch.equal(earlier.kernel_weights.float(), member.kernel_weights)
        assert earlier.metadata == member.metadata
    for mixture in (loaded, [loaded[0], members[1]]):
        assert torch.equal(ensemble(mixture).values, expected.values)
    loaded[0].save(tmp_path / "again.safetensors")
    assert torch.equal(InfluenceScores.load(tmp_path / "again.safetensors").kernel_weights, loaded[0].kernel_weights)


def test_an_ensemble_of_trak_keeps_its_weights_and_needs_each_members(trak):
    _, members = trak
    whole = ensemble(members)
    weights = torch.stack([member.kernel_weights.double() for member in members])
    kernels = torch.stack([member.values.double() for member in members]) / weights.unsqueeze(1)
    torch.testing.assert_close(whole.values.double(), kernels.mean(0) * weights.mean(0), rtol=1e-6, atol=1e-9)
    assert torch.equal(whole.kernel_weights, weights.mean(0))
    torch.testing.assert_close(ensemble([whole]).values, whole.values)
    bare = InfluenceScores(whole.values, whole.train_ids, whole.query_ids, None, members[0].metadata)
    for group in ([bare], [members[0], bare]):
        with pytest.raises(MisconfigurationException, match=rf"members {len(group) - 1} have no `kernel_weights`"):
            ensemble(group)
