"""What runs the claims: worlds, jobs, measurements, statistics, the page."""
