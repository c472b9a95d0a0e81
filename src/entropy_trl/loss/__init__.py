"""Where a control meets the loss of TRL."""
