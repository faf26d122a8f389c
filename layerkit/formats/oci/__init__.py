"""Documents of OCI and docker images, and artifacts."""
