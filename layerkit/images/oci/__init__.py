"""OCI layouts and archives."""
