"""The estimators: one file each, entered under the name that ``method=`` takes."""

from lightning_source.estimators import influence as influence
from lightning_source.estimators import source as source
from lightning_source.estimators import tracin as tracin
from lightning_source.estimators.registry import Contraction as Contraction
from lightning_source.estimators.registry import Query as Query
from lightning_source.estimators.registry import estimator_for as estimator_for
