"""Where images lie: references, and the sources and sinks of each kind of place."""
