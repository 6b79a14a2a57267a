"""Quiet training is eval mode where only noise and statistics tell the two apart."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_source.capture.quiet import quiet_training


class Function(nn.Module):
    """A function of the input that is given the module's own mode, as users write it."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("mean", torch.linspace(0, 1, 6))
        self.register_buffer("variance", torch.linspace(1, 2, 6))

    def forward(self, x):
        return self.function(self, x)


class LastOf(nn.Module):
    def __init__(self, recurrent) -> None:
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x):
        return self.recurrent(x.unflatten(1, (3, 2)))[0]


NETWORKS = {
    "dropout": lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)),
    "alpha dropout": lambda: nn.AlphaDropout(0.5),
    "batch norm": lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6)),
    "lstm with dropout": lambda: LastOf(nn.LSTM(2, 4, num_layers=2, dropout=0.5, batch_first=True)),
    "transformer layer": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 2)), nn.TransformerEncoderLayer(2, 1, 4, dropout=0.5, batch_first=True)
    ),
    "F.dropout": lambda: Function(lambda self, x: F.dropout(x, 0.5, self.training)),
    "F.dropout by name": lambda: Function(lambda self, x: F.dropout(x, training=self.training)),
    "torch.dropout": lambda: Function(lambda self, x: torch.dropout(x, 0.5, self.training)),
    "F.dropout1d": lambda: Function(lambda self, x: F.dropout1d(x.unsqueeze(2), 0.5, self.training)),
    "F.batch_norm": lambda: Function(lambda self, x: F.batch_norm(x, self.mean, self.variance, training=self.training)),
    "F.batch_norm by place": lambda: Function(
        lambda self, x: F.batch_norm(x, self.mean, self.variance, None, None, self.training)
    ),
    "attention": lambda: Function(
        lambda self, x: F.scaled_dot_product_attention(
            *[x.unflatten(1, (3, 2))] * 3, dropout_p=0.5 if self.training else 0.0
        )
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_eval_mode_without_its_name(name):
    torch.manual_seed(0)
    network, x = NETWORKS[name](), torch.randn(4, 6)
    expected = copy.deepcopy(network).eval()(x)
    before = copy.deepcopy(network.state_dict())
    assert not torch.equal(copy.deepcopy(network)(x), expected)
    with quiet_training(network):
        torch.testing.assert_close(network(x), expected)
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])


def test_modes_come_back():
    network = nn.Sequential(nn.Dropout(), nn.Dropout().eval(), nn.BatchNorm1d(3))
    with pytest.raises(RuntimeError), quiet_training(network):
        raise RuntimeError
    assert [child.training for child in network] == [True, False, True]


def test_the_users_branches_see_training():
    network = Function(lambda self, x: 2 * x if self.training else x)
    with quiet_training(network):
        assert torch.equal(network(torch.ones(2)), torch.full((2,), 2.0))


def test_statistics_of_the_batch_stay_where_there_are_no_others():
    network = nn.BatchNorm1d(3, track_running_stats=False)
    x = torch.randn(5, 3)
    with quiet_training(network):
        torch.testing.assert_close(network(x).mean(0), torch.zeros(3), atol=1e-6, rtol=0)
