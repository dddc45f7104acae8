"""Train or evaluate a trainer on a dataset: `python train.py --help` (dlr_clip_cli/train.py) says how.

The arguments are in dlr_clip_cli/train.py, the application in trainers/app/.
"""

import sys

from dlr_clip_cli.train import main

if __name__ == "__main__":
    sys.exit(main())
