"""What `plan` does: compile the training step for a TPU that this machine lacks, and read it."""
