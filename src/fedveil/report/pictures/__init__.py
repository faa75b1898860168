"""Pictures of runs, drawn by matplotlib."""

from fedveil.report.pictures.frontier import plot_frontier
from fedveil.report.pictures.plot import plot

__all__ = ["plot", "plot_frontier"]
