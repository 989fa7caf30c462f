"""Models that begin at random and are only compared with: no command compresses to them."""
