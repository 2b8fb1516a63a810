"""bakeoff tells you which published language-model method actually helps on your data."""

__version__ = "0.1.0"
