"""What an OCI runtime's config.json is made of."""
