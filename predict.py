"""Predict the classes of images: `python predict.py --help` (dlr_clip_cli/predict.py) says how.

The arguments are in dlr_clip_cli/predict.py, the application in trainers/app/.
"""

import sys

from dlr_clip_cli.predict import main

if __name__ == "__main__":
    sys.exit(main())
