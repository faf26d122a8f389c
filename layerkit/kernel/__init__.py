"""Linux system calls by ctypes, and feature probes."""
