"""layerkit: change who owns files in container images by writing metadata only."""

__version__ = "0.1.0"
