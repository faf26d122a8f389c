"""podman's storage, and the mount program that it runs."""
