"""Job files that train a recipe on a cluster, through the scheduler that is there."""
