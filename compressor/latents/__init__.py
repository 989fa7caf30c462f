"""From moments to weights: low-rank optima, and how they fold into projections."""
