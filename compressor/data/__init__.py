"""Text and token windows: where calibration, healing and evaluation get their data."""
