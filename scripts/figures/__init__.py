"""Commands that draw figures of finished runs (plot_*.py), and how figures look."""
