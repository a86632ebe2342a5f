"""`python -m attnproc.app`."""

from attnproc.app.cli import main

main()
