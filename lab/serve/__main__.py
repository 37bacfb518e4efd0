"""`python -m lab.serve`: the command line of lab.serve.chaos."""

from lab.serve.chaos import main

main()
