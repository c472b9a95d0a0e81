"""What watches a run: token records, entropy regions, the entropy law."""
