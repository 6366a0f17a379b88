"""Training: the two stages, their losses, adapters and batches."""
