"""What prefloop withstands: hostile input (`fuzz`)."""
