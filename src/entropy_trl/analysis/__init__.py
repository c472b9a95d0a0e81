"""Analysis of what a run has logged. Reads files only and never imports the trainer."""
