"""A local page on which people judge a round's pairs, and how their verdicts come back into a run."""
