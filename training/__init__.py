"""What turns rollouts into better policies, and keeps doing so."""
