"""What runs logged: the files that hold a log, whichever trainer and tracker wrote them, and the run that they make."""
