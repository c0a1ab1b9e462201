"""What makes preference pairs: one file for each rule. A new file here is found and tested by its name."""
