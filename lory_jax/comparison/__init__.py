"""What `compare` does: read finished runs, and work out how they differ."""
