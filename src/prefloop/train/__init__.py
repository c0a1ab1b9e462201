"""From pairs to a policy: batches, the reference's log-probabilities, the optimizer loop."""
