"""Prompts of another distribution: the policy that a run ended with against its start, beside the run's own holdout."""
