"""A containerd snapshotter as a state machine: it knows folders, mounts and SQLite, and no gRPC.

``values`` are what goes in and out, ``filters`` containerd's filter syntax, ``catalog`` what is on disk for sure,
``chains`` the layers that lie in layerkit's own store, ``stacks`` how a chain of snapshots becomes mounts,
``snapshotter`` the operations.
"""
