"""`python -m attnproc.verify`."""

from attnproc.verify.run import app

app()
