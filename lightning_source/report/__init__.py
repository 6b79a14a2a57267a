"""Scores as one HTML file that can be opened without a network."""

from lightning_source.report.page import LdsResult as LdsResult
from lightning_source.report.page import Scores as Scores
from lightning_source.report.page import require_report_packages as require_report_packages
from lightning_source.report.page import write_report as write_report
