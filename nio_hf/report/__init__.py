"""Reports of a run: tables, plots, and one page with all of them."""

from nio_hf.report.history import plot_history
from nio_hf.report.plots import draw_run, plot_inspection, plot_scales, plot_training
from nio_hf.report.tables import SummaryRow, summary_rows

__all__ = ["SummaryRow", "draw_run", "plot_history", "plot_inspection", "plot_scales", "plot_training", "summary_rows"]
