"""Renderings of a metadata layer."""
