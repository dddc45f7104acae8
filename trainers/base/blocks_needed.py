"""Say what a method needs of CLIP's encoders, and refuse a backbone that lacks it: blocks, or tokens."""

from __future__ import annotations

from typing import Any

from ..clip import is_resnet, why_no_blocks


class BlocksNeeded:
    """Check a method's backbone by its name alone. All is asked of the class, before anything is loaded.

    A method without blocks takes CLIP's features of images and texts alone, and works with every backbone.
    """

    needs_transformer = ""  # why the image encoder must be a vision transformer; "": it may be a ResNet, too
    adapters = "none"  # whether MODEL.IMO_WEIGHTS corrects the features: none (it is refused) | optional | needed

    @classmethod
    def needs_blocks(cls, cfg: Any) -> str:
        """Return what the method does with the blocks under this configuration, for a message; "": nothing."""
        return "corrects features within the image encoder" if cls.adapters == "needed" else ""

    @classmethod
    def why_not_on(cls, cfg: Any) -> str:
        """Return why the method cannot work with the configuration's backbone; "": it can, as far as names tell.

        Raises:
            ValueError: there is no such backbone.
        """
        name = cfg.MODEL.BACKBONE.NAME
        if name and cls.needs_transformer and is_resnet(name):
            return (
                f"Expected MODEL.BACKBONE.NAME to be a vision transformer for {cls.__name__}, {cls.needs_transformer}, "
                f"but got the ResNet {name!r}"
            )
        reason = cls.needs_blocks(cfg) if name else ""
        found = why_no_blocks(name) if reason else ""
        if not found:
            return ""
        return (
            "Expected MODEL.BACKBONE.NAME to be a plain CLIP (ViT or ResNet, causal text transformer, CLIP's "
            f"vocabulary) for {cls.__name__}, which {reason}, but {found}: methods that take CLIP's final features "
            "work with it (zero-shot CLIP, linear probes, caches of training images, Gaussians and others)"
        )

    @classmethod
    def check_blocks(cls, cfg: Any) -> None:
        """Refuse a backbone that the method cannot work with.

        Raises:
            ValueError: its blocks cannot be run, or it is a ResNet, and the method needs something else.
        """
        reason = cls.why_not_on(cfg)
        if reason:
            raise ValueError(reason)
