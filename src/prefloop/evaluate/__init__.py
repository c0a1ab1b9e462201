"""What a round was worth: metrics on held-out prompts with intervals, the gate, and the report.

`bootstrap` gives intervals over prompts, `heldout` the metrics, `gate` and `always` decide, `summary` and
`terminal` put the result into words and a table, `report` into a page. Nothing here imports torch.
"""
