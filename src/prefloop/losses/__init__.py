"""One file for each published objective. A file here is the method: its fields, its equation, its departures."""
