"""Rules over trees: merge, diff, squash, and what a filesystem keeps of an entry."""
