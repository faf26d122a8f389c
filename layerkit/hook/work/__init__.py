"""Doing the jobs."""
