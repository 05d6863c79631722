"""What NF4 is: the dtypes, the tables of codes, and the recipe that a user may choose."""
