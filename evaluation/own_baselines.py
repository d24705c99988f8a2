"""Your own baselines: functions of a Past with ``@baseline``; docs/own_baseline.md shows an example.

They walk every exam and evaluation beside the built-in ones, and a policy must beat them, too.
"""
