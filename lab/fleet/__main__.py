"""`python -m lab.fleet`: the command line of lab.fleet.figures."""

from lab.fleet.figures import main

if __name__ == "__main__":  # the process of lab.fleet.live imports this file too
    main()
