"""Parts that several methods share. They know CLIP and torch, but no method and no method's key."""
