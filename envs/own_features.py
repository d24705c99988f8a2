"""Your own features: functions of a History with ``@feature``; docs/features.md shows an example.

They become columns after the built-in ones, and are normalised and tested for look-ahead in the same way.
"""
