"""What 4 bits lose, and how to lose less: calibration and evaluation."""
