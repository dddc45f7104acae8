"""Say whether a method needs the blocks of CLIP's encoders, and refuse a backbone that is taken as a whole."""

from __future__ import annotations

from typing import Any

from ..clip import why_no_blocks


class BlocksNeeded:
    """Check a method's backbone by its name alone. All is asked of the class, before anything is loaded.

    A method without blocks takes CLIP's features of images and texts alone, and works with every backbone.
    """

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
        reason = cls.needs_blocks(cfg) if cfg.MODEL.BACKBONE.NAME else ""
        found = why_no_blocks(cfg.MODEL.BACKBONE.NAME) if reason else ""
        if not found:
            return ""
        return (
            "Expected MODEL.BACKBONE.NAME to be a plain CLIP (ViT or ResNet, causal text transformer, CLIP's "
            f"vocabulary) for {cls.__name__}, which {reason}, but {found}: methods that take CLIP's final features "
            "work with it (zero-shot CLIP, linear probes, caches of training images, Gaussians and others)"
        )

    @classmethod
    def check_blocks(cls, cfg: Any) -> None:
        """Refuse a backbone whose blocks cannot be run, where the method needs them.

        Raises:
            ValueError: the method needs them.
        """
        reason = cls.why_not_on(cfg)
        if reason:
            raise ValueError(reason)
