"""Toolbox for few-shot adaptation: the Dassl 0.6.3 API on current PyTorch.

Module paths, names, call signatures and config keys are those that CoOp-style trainers and datasets import;
the code beneath them is new.
"""

# The API level this package offers, plus a local label that tells it apart from upstream's distribution.
__version__ = "0.6.3+dlrclip"
