"""What the benchmarks share: cases, timing, curves of runs, reports, and what they compare with."""
