"""Labels that look wrong: planted errors are found, and their true labels suggested."""

import pytest
import torch
from helpers import Classifier, mlp, quiet_trainer
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_source import SourceCallback, SourceScorer, label_issues

N, WRONG = 60, {7: 2, 20: 0, 41: 1}  # the position of each wrong label, and what is given there


def blobs():
    """Three classes far apart, and their true labels."""
    generator = torch.Generator().manual_seed(0)
    true = torch.arange(N) % 3
    inputs = 0.5 * torch.randn(N, 6, generator=generator)
    inputs[torch.arange(N), true] += 3
    return inputs, true


class Plain(Dataset):
    """A dataset that has no labels at hand."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, n):
        return self.dataset[n]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("issues")
    inputs, true = blobs()
    given = true.clone()
    for n, label in WRONG.items():
        given[n] = label
        assert label != true[n]
    data = TensorDataset(inputs, given)
    torch.manual_seed(0)
    model = Classifier(mlp(hidden=16))
    quiet_trainer(path, SourceCallback(str(path / "run")), max_epochs=20).fit(model, DataLoader(data, 8, shuffle=True))
    return SourceScorer.from_run(path / "run", model, measurement="margin"), data, true


def test_planted_errors_come_first_with_their_true_labels(recorded):
    scorer, data, true = recorded
    issues = label_issues(scorer, DataLoader(data, 8), k=len(WRONG))
    assert {issue.train for issue in issues} == WRONG.keys()
    assert [issue.label for issue in issues] == [WRONG[issue.train] for issue in issues]
    assert [issue.suggested for issue in issues] == true[[issue.train for issue in issues]].tolist()
    assert [issue.rank for issue in issues] == [1, 2, 3]
    assert all(issue.support > 0.5 for issue in issues)


def test_columns_are_what_they_say(recorded):
    scorer, data, _ = recorded
    issues = label_issues(scorer, data, k=10)
    loss = SourceScorer(scorer.run, "loss")
    suspicion = loss.self_influence(data)
    assert [issue.self_influence for issue in issues] == suspicion.sort(descending=True).values[:10].tolist()
    for issue in issues:
        assert issue.self_influence == suspicion[issue.train]
        opposition = dict.fromkeys({0, 1, 2} - {issue.label}, 0.0)
        for n, score in enumerate(loss.score([part[None] for part in data[issue.train]], data).values[0].tolist()):
            if score < 0 and int(data[n][1]) != issue.label:
                opposition[int(data[n][1])] -= score
        assert issue.suggested == max(opposition, key=opposition.get)
        # Sums of 60 float32 scores, taken in another batch.
        assert issue.support == pytest.approx(max(opposition.values()) / sum(opposition.values()), rel=1e-4)


def test_labels_may_be_given(recorded):
    scorer, data, _ = recorded
    named = (10 * data.tensors[1]).tolist()  # they need not count from 0
    issues = label_issues(scorer, Plain(data), named, k=3)
    expected = label_issues(scorer, data, k=3)
    assert [(one.label, one.suggested) for one in issues] == [(10 * one.label, 10 * one.suggested) for one in expected]


def test_where_nobody_objects_nothing_is_suggested(recorded):
    scorer, data, _ = recorded
    issues = label_issues(scorer, data, [1] * N, k=2)
    assert [(issue.label, issue.suggested, issue.support) for issue in issues] == [(1, None, 0.0)] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "the labels are not known.*HINT: `labels=`"),
        ({"labels": [0, 1]}, r"of the shape \[2\], and must be one integer for each of 60"),
        ({"labels": torch.zeros(N)}, "float32"),
        ({"labels": [0] * N, "k": 0}, "`k=0`"),
    ],
)
def test_wrong_input_is_refused(recorded, arguments, message):
    scorer, data, _ = recorded
    with pytest.raises(Exception, match=message):
        label_issues(scorer, Plain(data), **arguments)
