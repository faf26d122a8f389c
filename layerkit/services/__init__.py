"""Services: long-running processes around the use cases."""
