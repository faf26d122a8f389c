"""gzip and zstd, in and out."""
