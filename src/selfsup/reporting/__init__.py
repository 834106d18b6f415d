"""The report: one self-contained HTML page about a run, and one picture for a README.

It only reads run folders; nothing here imports torch.
"""

from selfsup.reporting.figure import write_figure
from selfsup.reporting.page import write_report

__all__ = ["write_figure", "write_report"]
