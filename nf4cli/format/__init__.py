"""The NF4 format itself: dtypes, tables of codes, and the options that a user may choose."""
