"""One verb a file, each a function over ports."""
