"""Scores as one HTML file that can be opened without a network."""

from lightning_source.report.page import write_report as write_report
