"""Evaluation: what a policy is worth on days that it was not trained on, and who may call itself the best."""
