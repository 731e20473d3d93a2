"""`python -m service` is `miss-iwem`."""

from service.cli import app

app()
