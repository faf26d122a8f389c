"""What this host can do, and where bytes and page cache go."""
