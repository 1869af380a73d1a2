"""Command line of lmopt."""
