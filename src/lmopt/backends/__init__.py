"""Rooms of the engines that come with lmopt; each is reached by entry point only."""
