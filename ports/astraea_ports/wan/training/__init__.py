"""Training of Wan's parts."""
