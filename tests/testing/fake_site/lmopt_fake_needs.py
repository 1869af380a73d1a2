"""The module that the fake backend requires."""
