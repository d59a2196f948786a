"""Recorded results -> figures."""
