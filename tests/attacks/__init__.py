"""Hostile files, one an attack, and the program that makes them."""
