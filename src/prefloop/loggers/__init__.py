"""Where a run's numbers can be sent beside its own files: only to what the user names in `loggers`."""
