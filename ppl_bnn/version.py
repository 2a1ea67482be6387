"""The package's version, apart from the package so that reading it imports nothing."""

__version__ = "0.2.0.dev0"
