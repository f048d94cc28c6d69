"""bagel-serving: exact serving of BAGEL, one model that understands and generates images."""

__version__ = "0.1.0"
