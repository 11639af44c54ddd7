"""What the scripts in `benchmarks/` share: caches, steps, timing and the record they write."""
