"""Your own features go here: functions of a History under ``@feature``; docs/features.md shows one.

They become columns after the built-in ones, are normalised like them, and are tested for foresight like them.
"""
