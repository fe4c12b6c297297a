"""Benchmarks; each checks that the results agree before it times anything."""
