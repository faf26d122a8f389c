"""The kernel: system calls, mounts, user namespaces, probes, durable writes."""
