"""What the verb `plan` reads off a training step compiled for a TPU topology that is not there."""
