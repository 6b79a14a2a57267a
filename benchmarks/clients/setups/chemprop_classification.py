"""A message passing network of Chemprop on a classification, as in its notebook on training."""

from __future__ import annotations

from chemprop import data, featurizers, models, nn
from molecules import SMILES, WITH_NITROGEN
from setup import SetUp, seeded

NAME = "chemprop: classification"
REQUIREMENTS = ["chemprop==2.3.1"]


def build(seed: int) -> SetUp:
    """The notebook's network, smaller, on whether there is nitrogen."""
    seeded(seed)
    points = [
        data.MoleculeDatapoint.from_smi(smiles, [kind]) for smiles, kind in zip(SMILES, WITH_NITROGEN, strict=True)
    ]
    molecules = data.MoleculeDataset(points, featurizers.SimpleMoleculeMolGraphFeaturizer())
    passing = nn.BondMessagePassing(d_h=16, depth=2)
    head = nn.BinaryClassificationFFN(input_dim=passing.output_dim, hidden_dim=16)
    module = models.MPNN(passing, nn.MeanAggregation(), head, batch_norm=True)
    return SetUp(module, data.build_dataloader(molecules, batch_size=8, num_workers=0))
