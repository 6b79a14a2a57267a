"""Small molecules for the libraries of chemistry, with two properties that their formulas decide."""

from __future__ import annotations

SMILES = [
    "CCO",
    "CCCO",
    "CCN",
    "CCCN",
    "CC(C)O",
    "CC(C)N",
    "c1ccccc1",
    "Cc1ccccc1",
    "Oc1ccccc1",
    "Nc1ccccc1",
    "CC(=O)O",
    "CCC(=O)O",
    "CCOC",
    "CCOCC",
    "CCCl",
    "CCBr",
    "CC#N",
    "CCC#N",
    "C1CCCCC1",
    "C1CCNCC1",
    "C1CCOCC1",
    "c1ccncc1",
    "c1ccoc1",
    "c1ccsc1",
    "CC(=O)N",
    "CCS",
    "CSC",
    "CC=O",
    "CCC=O",
    "CC(C)=O",
    "OCCO",
    "NCCN",
]
SIZE = [float(sum(letter.isalpha() for letter in smiles)) for smiles in SMILES]
WITH_NITROGEN = [float("n" in smiles.lower()) for smiles in SMILES]
