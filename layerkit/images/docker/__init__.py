"""Docker archives and the docker daemon."""
