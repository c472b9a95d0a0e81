"""What a control sees, and how tokens are chosen. Needs torch and NumPy."""
