"""Frozen values without IO: digests, descriptors, images, entries, indexes and trees."""
