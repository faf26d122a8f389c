"""EROFS images: write, read, patch."""
