"""Indexes of layers: the kept file, and tables of contents that blobs bring."""
