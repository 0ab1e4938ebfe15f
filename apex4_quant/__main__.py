"""`python -m apex4_quant` is `apex4`."""

from .cli import main

main()
