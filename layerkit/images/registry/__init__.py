"""Images in registries (OCI distribution-spec 1.1 and the docker registry API that it grew from)."""
