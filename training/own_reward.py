"""Your own reward: one function of a Decision with ``@reward``; docs/own.md shows an example.

Only what is learnt changes. Accounts, exams, reports and champions stay in money, net of all costs.
"""
