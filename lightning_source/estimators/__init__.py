"""The estimators: one file each, entered under the name that ``method=`` takes."""

from lightning_source.estimators import astra as astra
from lightning_source.estimators import astra_source as astra_source
from lightning_source.estimators import cg as cg
from lightning_source.estimators import datainf as datainf
from lightning_source.estimators import influence as influence
from lightning_source.estimators import lissa as lissa
from lightning_source.estimators import repsim as repsim
from lightning_source.estimators import source as source
from lightning_source.estimators import tracin as tracin
from lightning_source.estimators import trak as trak
from lightning_source.estimators.registry import Contraction as Contraction
from lightning_source.estimators.registry import Query as Query
from lightning_source.estimators.registry import Table as Table
from lightning_source.estimators.registry import estimator_for as estimator_for
from lightning_source.estimators.registry import held_by as held_by
from lightning_source.estimators.registry import unit_of as unit_of
