"""What `prefloop check` looks for: one file for each kind of thing, from data files up to the judge."""
