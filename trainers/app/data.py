"""The project's datasets, by the name that they have: `datasets` in the checkout, `dlr_clip.datasets` once installed.

Everything that needs them imports them from here, so that no process has them under two names.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets
    from datasets import files, image_folder, layout, open_images
else:
    _package = __name__.partition(".")[0]
    _name = "datasets" if _package == "trainers" else f"{_package}.datasets"
    datasets = import_module(_name)
    files, image_folder, layout, open_images = (
        import_module(f"{_name}.{module}") for module in ("files", "image_folder", "layout", "open_images")
    )

__all__ = ["datasets", "files", "image_folder", "layout", "open_images"]
