"""Claims about other methods than those that train a policy on its own completions: `make claims-more`."""
