"""See lab.fleet.figures."""

from lab.fleet.figures import main

main()
