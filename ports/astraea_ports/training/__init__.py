"""What every training shares: a run in a folder, its recipe, its pool of clips."""
