"""What runs inside a sandbox. These modules need the standard library alone, and reach a sandbox as code."""
