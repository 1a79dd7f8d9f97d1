"""The version of this package, also where it runs out of a source tree and is not installed."""

VERSION = "0.1.0"
