"""Mounts of stored images."""
