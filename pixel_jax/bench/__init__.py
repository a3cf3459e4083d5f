"""Measurements of speed and memory, compared with other libraries and with the machine's peak rates."""
