"""Measures of quality, parity, speed and memory."""
