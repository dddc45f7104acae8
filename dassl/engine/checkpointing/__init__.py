"""Save a run so that it can be stopped at any point, and go on as if it had not been."""
