"""EROFS images: one module for the structures, one writer, one reader."""
