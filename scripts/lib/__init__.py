"""Share among the commands: runs and their folders, grids and jobs, tables. No module here is a command."""
