"""An overlay upper made opaque to its lower."""
