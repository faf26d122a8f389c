"""Work on this host: mounts, bundles, snapshotters."""
