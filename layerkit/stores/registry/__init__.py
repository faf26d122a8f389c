"""Images in registries (OCI distribution-spec 1.1 and the docker registry API that it grew from).

``client`` is what others build on: :class:`RegistryClient` and the :class:`Repository` objects it gives.
``source`` and ``sink`` are the ports of the use cases over it. Importing this package imports nothing heavy.
"""
