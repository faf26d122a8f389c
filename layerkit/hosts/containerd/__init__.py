"""containerd's gRPC interfaces: the snapshots service that we offer, and what we ask of containerd itself.

Messages are in ``snapshots.proto`` and ``client.proto``, written for layerkit: only names of services and methods
and numbers of fields are containerd's. ``make proto`` makes the Python modules from them.
"""
