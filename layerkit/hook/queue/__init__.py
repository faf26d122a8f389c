"""Jobs, kept in a database."""
