"""A conforming fake backend: what the conformance kit is itself tested on."""
