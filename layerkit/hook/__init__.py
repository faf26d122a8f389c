"""The pre-pull hook: a registry's events become jobs, and jobs become remap artifacts before a node pulls.

``events`` understands what registries send, ``queue`` keeps it, ``worker`` gets it done, ``http`` and ``proxy``
are the two doors. Nothing here knows how a remap is made: ``tasks`` calls the use cases.
"""
