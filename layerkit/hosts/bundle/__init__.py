"""OCI runtime bundles."""
