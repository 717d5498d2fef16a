"""What `plan` does: compile the training step for a TPU that is not there, and read it."""
