"""containerd: the snapshots service that we offer it, and what we ask of it.

Messages are in ``messages.proto``, written for layerkit: only names of services and methods and numbers of fields
are containerd's. ``make proto`` makes the Python module from it.
"""
