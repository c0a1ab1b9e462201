"""What scores or compares completions: one file for each judge. A new file here is found and tested by its name."""
