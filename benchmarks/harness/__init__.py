"""What the benchmarks share: programs to time, how to time them, and how to show it."""
