"""HTTP: what senders, clients and people reach."""
