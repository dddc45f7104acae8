"""Commands that only work on the project itself; they are not installed."""
