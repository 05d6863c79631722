"""Draw what a command found out as one page of HTML, which loads nothing from anywhere."""
