"""The pre-pull hook: a registry's events become jobs, and jobs become remap artifacts before a node pulls.

The ``queue`` keeps jobs, ``work`` gets them done by calling the use cases, ``front`` and ``batch`` bring new ones.
"""
