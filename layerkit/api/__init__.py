"""What Python callers touch: open an image, look at it, make others out of it, mount it."""
