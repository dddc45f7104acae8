"""In place of train.py in tests of launchers: leaves the completion marker, and a line for each time it was started.

Files in the run's folder change what it does: "fail" (exit code 3), "linger" (the first start takes a minute).
"""

import datetime
import json
import sys
import time
from pathlib import Path

folder = Path(sys.argv[sys.argv.index("--output-dir") + 1])
first = not (folder / "starts").exists()
with open(folder / "starts", "a", encoding="utf-8") as stream:
    stream.write(" ".join(sys.argv[1:]) + "\n")
if (folder / "fail").exists():
    sys.exit(3)
time.sleep(60 if first and (folder / "linger").exists() else 0.1)
finished = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
(folder / "DONE").write_text(json.dumps({"finished": finished}), encoding="utf-8")
