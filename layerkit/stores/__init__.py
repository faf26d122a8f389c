"""The local store, and one file per image transport."""
