"""What times a machine, and says how exact it is: `astraea bench`."""
