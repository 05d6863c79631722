"""How a plan is carried out, and what is left when it is stopped."""
