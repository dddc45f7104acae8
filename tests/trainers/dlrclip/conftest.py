"""What the tests here take from the helpers; the fixtures are those of the folder above."""

from random_clip import NAMES, random_open_clip

__all__ = ["NAMES", "random_open_clip"]
