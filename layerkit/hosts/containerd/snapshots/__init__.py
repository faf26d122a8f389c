"""A containerd snapshotter as a state machine: it knows folders, mounts and SQLite, and no gRPC.

``snapshotter`` are the operations, ``catalog`` what is on disk for sure and what goes in and out, ``filters``
containerd's filter syntax, ``chains`` the layers that lie in layerkit's own store, ``layers`` what snapshots stand
on, where that is mounted, and how it becomes mounts.
"""
