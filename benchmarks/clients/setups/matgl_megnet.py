"""MatGL's MEGNet on a property of crystals, as in its tutorial on training with Lightning."""

from __future__ import annotations

import tempfile

import torch
from matgl.ext.pymatgen import Structure2Graph, get_element_list
from matgl.graph.data import MGLDataLoader, MGLDataset, collate_fn_graph, split_dataset
from matgl.layers import BondExpansion
from matgl.models import MEGNet
from matgl.utils.training import ModelLightningModule
from pymatgen.core import Lattice, Structure
from setup import SetUp, seeded

NAME = "matgl: MEGNet"
REQUIREMENTS = ["matgl==4.1.2"]


def build(seed: int) -> SetUp:
    """Rock salts and caesium chlorides of random size; the property is their cell's volume an atom."""
    seeded(seed)
    structures, volumes = [], []
    for index in range(24):
        length = 3.6 + float(torch.rand(()))
        space_group = ("Fm-3m", "Pm-3m")[index % 2]
        species = (("Na", "Cl"), ("Cs", "Cl"), ("Li", "F"))[index % 3]
        sites = [[0, 0, 0], [0.5, 0.5, 0.5]]
        made = Structure.from_spacegroup(space_group, Lattice.cubic(length + 1 - index % 2), species, sites)
        structures.append(made.get_primitive_structure())
        volumes.append(made.volume / len(made))
    elements = get_element_list(structures)
    data = MGLDataset(
        structures=structures,
        labels={"volume": volumes},
        converter=Structure2Graph(element_types=elements, cutoff=4.0),
        root=tempfile.mkdtemp(),
        save_cache=False,
    )
    train, validation, _ = split_dataset(data, frac_list=[0.8, 0.1, 0.1], shuffle=True, random_state=42)
    loader, _ = MGLDataLoader(train, validation, collate_fn=collate_fn_graph, batch_size=4, num_workers=0)
    model = MEGNet(
        dim_node_embedding=4,
        dim_edge_embedding=8,
        dim_state_embedding=2,
        nblocks=1,
        hidden_layer_sizes_input=(8, 4),
        hidden_layer_sizes_conv=(8, 8, 4),
        nlayers_set2set=1,
        niters_set2set=2,
        hidden_layer_sizes_output=(8, 4),
        element_types=elements,
        bond_expansion=BondExpansion(rbf_type="Gaussian", initial=0.0, final=5.0, num_centers=8, width=0.5),
        cutoff=4.0,
    )
    return SetUp(ModelLightningModule(model=model), loader)
