"""The part "tests": the tests marked `cuda`, in a process of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.session import Session

ROOT = Path(__file__).resolve().parents[2]
_TAIL = 20000  # characters of the output that are kept


def tests(session: Session) -> None:
    """A row: the exit code and the last lines of pytest; code None: it was stopped at the end of its time."""
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "tests/cuda", "-p", "no:cacheprovider"]
    command += ["-v", "--no-header", "--durations=8", "--tb=short"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, session.left - 3))
        code, text = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        out = error.stdout or b""
        code, text = None, out.decode(errors="replace") if isinstance(out, bytes) else out
    lines = [line for line in text.splitlines() if line.strip()]
    session.add(what="tests", code=code, summary=lines[-1] if lines else "", output=text[-_TAIL:])
