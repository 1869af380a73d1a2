"""Conformance kit for backends, tiny seeded models, and the table of tolerances."""
