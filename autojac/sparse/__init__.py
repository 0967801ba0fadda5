"""Colorings and compressed sparse rows: plain index arrays, no torch graph."""
