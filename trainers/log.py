"""Mark lines of a run's log."""

from __future__ import annotations

from collections.abc import Mapping

# For a record that log.txt has and the console does not: `logger.info("...", extra=DETAIL)`. This project's toolbox
# reads the mark (dassl/utils/logger.py); upstream's shows every line.
DETAIL: Mapping[str, object] = {"detail": True}
