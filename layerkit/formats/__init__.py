"""Bytes to values and back; no paths, no sockets."""
