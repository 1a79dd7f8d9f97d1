"""`python -m w2a4.cli`, also under torchrun and accelerate."""

from . import run

run()
