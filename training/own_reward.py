"""Your own reward: one function of a Decision with ``@reward``; docs/own_reward.md shows an example.

Only what is learnt changes. Accounts, exams, reports and champions stay in money, net of all costs.
"""
