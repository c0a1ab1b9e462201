"""What stands behind the commands beside `run`: one file for each, named like it, and what only it needs."""
