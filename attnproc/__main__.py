"""`python -m attnproc`."""

from attnproc.app.cli import main

main()
