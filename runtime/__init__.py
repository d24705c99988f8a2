"""Processes, files and locks: standard library only, so that it runs before anything is installed."""
