"""What `analyze` does: whether the experts of a run specialise, and in what."""
