"""A message passing network of Chemprop on a regression, as in its notebook on training."""

from __future__ import annotations

from chemprop import data, featurizers, models, nn
from molecules import SIZE, SMILES
from setup import SetUp, seeded

NAME = "chemprop: regression"
REQUIREMENTS = ["chemprop==2.3.1"]


def build(seed: int) -> SetUp:
    """The notebook's network, smaller, on the number of atoms."""
    seeded(seed)
    points = [data.MoleculeDatapoint.from_smi(smiles, [size]) for smiles, size in zip(SMILES, SIZE, strict=True)]
    molecules = data.MoleculeDataset(points, featurizers.SimpleMoleculeMolGraphFeaturizer())
    scaler = molecules.normalize_targets()
    passing = nn.BondMessagePassing(d_h=16, depth=2)
    transform = nn.UnscaleTransform.from_standard_scaler(scaler)
    head = nn.RegressionFFN(input_dim=passing.output_dim, hidden_dim=16, output_transform=transform)
    module = models.MPNN(passing, nn.MeanAggregation(), head, batch_norm=True)
    return SetUp(module, data.build_dataloader(molecules, batch_size=8, num_workers=0))
