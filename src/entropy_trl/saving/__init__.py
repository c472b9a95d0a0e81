"""What outlives a run: checkpoints, uploads, the model card."""
