"""Carry out a plan, and keep what is finished when a run is stopped."""
