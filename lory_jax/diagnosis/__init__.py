"""What `doctor` checks: the devices of this machine, or a run directory and its data."""
