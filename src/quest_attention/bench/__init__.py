"""What the scripts in `benchmarks/` share: timing and the record they write."""
