"""`python -m dlr_clip_cli ...` is `dlr-clip ...`; torchrun wants a module: `torchrun -m dlr_clip_cli train ...`."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
