"""Looking inside the loop: trajectories, stability, routing, and the plots of them."""
