"""Meet what goes wrong in a run (lost numbers, two runs in one folder, a full disk), out of the loop's sight."""
