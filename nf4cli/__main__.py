"""python -m nf4cli"""

from .cli import main

main()
