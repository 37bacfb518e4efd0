"""See lab.serve.chaos."""

from lab.serve.chaos import main

main()
