"""Trees on disk: the reader and the writer of folders."""
