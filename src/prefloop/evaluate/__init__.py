"""What a round was worth: metrics on held-out prompts with intervals, the gate, and the report.

`bootstrap` gives intervals over prompts, `heldout` a round's metrics, `gate` and `always` decide, `summary` and
`terminal` put the result into words and a table, `report` into a page. `win_rate`, `bradley_terry`, `length_control`
and `frontier` compare policies, `looks` accounts for repeated looks, `agreement` compares judges; `text_metrics`,
`bleu`, `correctness`, `safety` and `constraints` measure texts, `lm_eval` runs benchmarks. Nothing here imports torch.
"""
