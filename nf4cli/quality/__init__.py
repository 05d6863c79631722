"""Lose less by calibration, and measure by evaluation how much 4 bits lose."""
