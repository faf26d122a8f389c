"""Renderings of one metadata layer: a directory, a tar, an EROFS image."""
